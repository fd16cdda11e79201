//! What Prometheus reads.

use crate::models::Served;
use kvpolicy_mistralrs::Figures;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};
use std::fmt;

/// The text of all metrics now.
pub(crate) fn text(served: &Served) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("kvpolicy");
    registry.register_collector(Box::new(served.clone()));
    let mut all = String::new();
    text::encode(&mut all, &registry)?;
    Ok(all)
}

/// Name, meaning, unit, value.
type Metric = (&'static str, &'static str, Option<Unit>, fn(&Figures) -> f64);

const GAUGES: [Metric; 7] = [
    ("running_sequences", "Sequences that hold a place in the cache", None, |f| f.served.running as f64),
    ("live_tokens", "Tokens held: the mean over layers and KV heads", None, |f| {
        f.usage.live_entries as f64 / f.entries_per_token as f64
    }),
    ("kv_in_use", "Pages that hold entries", Some(Unit::Bytes), |f| f.usage.bytes_in_use as f64),
    ("kv_peak", "The most that was in use", Some(Unit::Bytes), |f| f.usage.bytes_peak as f64),
    ("kv_reserved", "Taken from the system", Some(Unit::Bytes), |f| f.usage.bytes_reserved as f64),
    ("kv_limit", "The most that may be reserved", Some(Unit::Bytes), |f| {
        f.usage.bytes_limit.map_or(f64::INFINITY, |limit| limit as f64)
    }),
    ("compression", "Entries of a dense cache for one that is held: mean over all steps", None, |f| {
        f.stats.compression()
    }),
];

const COUNTERS: [Metric; 8] = [
    ("written_tokens", "Tokens written: the mean over layers and KV heads", None, |f| {
        f.usage.written as f64 / f.entries_per_token as f64
    }),
    ("evicted_tokens", "Tokens that the policy dropped: the mean over layers and KV heads", None, |f| {
        f.usage.evicted as f64 / f.entries_per_token as f64
    }),
    ("prompt_tokens", "Tokens of prompts, read again where a sequence started over", None, |f| {
        f.served.prompt_tokens as f64
    }),
    ("decoded_tokens", "Tokens read one at a time", None, |f| f.served.decoded_tokens as f64),
    ("decode_steps", "Passes that decoded", None, |f| f.served.decode_steps as f64),
    ("decode", "Time of passes that decoded", Some(Unit::Seconds), |f| f.served.decode_seconds),
    ("admission_waits", "Steps in which a prompt waited for memory", None, |f| f.served.waits as f64),
    ("set_aside", "Times that a sequence lost its memory to others, to start over", None, |f| {
        f.served.set_aside as f64
    }),
];

impl Collector for Served {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let all: Vec<_> = self.named_figures().map(|(name, figures)| ([("policy", name)], figures)).collect();
        for (name, help, unit, value) in GAUGES {
            let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
            for (policy, figures) in &all {
                ConstGauge::new(value(figures)).encode(metric.encode_family(policy)?)?;
            }
        }
        for (name, help, unit, value) in COUNTERS {
            let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
            for (policy, figures) in &all {
                ConstCounter::new(value(figures)).encode(metric.encode_family(policy)?)?;
            }
        }
        Ok(())
    }
}
