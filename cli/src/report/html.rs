//! `report.html`: one file, for a screen of any width.

use super::{
    DIFFERENCES, Findings, base,
    chart::{STYLE, escape, marker},
};
use kvpolicy::compare::Trace;
use serde_json::json;

const PAGE: &str = include_str!("page.css");
const SLIDER: &str = include_str!("slider.js");

pub(super) fn page(findings: &Findings) -> String {
    let report = &findings.report;
    let lead = format!(
        "{} policies on {}, seed {}. Up and to the left is better where shares are drawn, down and to the left where KL or perplexity \
         are; the dashed line joins what no other policy beats. Bars are 95% intervals.",
        findings.policies.len(),
        escape(&report.model),
        report.seed
    );
    let charts: Vec<String> =
        findings.pictures.iter().map(|picture| format!("<figure>{}</figure>", picture.chart.inline())).collect();
    let figures = &findings.figures;
    let mut sections = vec![
        format!("<h1>{}: policies compared</h1><p>{lead}</p>", escape(&report.model)),
        format!("{}<div class=\"charts\">{}</div>", legend(findings), charts.join("")),
        format!(
            "<h2>Figures</h2>{}<p>{}</p>",
            table(&figures.header, &figures.lines),
            escape(&figures.marks.replace('`', ""))
        ),
    ];
    if !findings.traces.is_empty() {
        sections.push(kept(&findings.traces));
        sections.push(heat_maps(&findings.traces));
    }
    if !findings.differences.is_empty() {
        let lines: Vec<Vec<String>> = findings.differences.iter().map(|line| line.to_vec()).collect();
        let note = "A policy's figure less the other's, over the same samples: nats per token, or the share of right answers. The \
                    interval is a paired bootstrap, p a paired randomization test.";
        let table = table(&DIFFERENCES.map(String::from), &lines);
        sections
            .push(format!("<h2>Differences</h2><p>{note}</p><details><summary>All of them</summary>{table}</details>"));
    }
    sections.push(format!("<h2>The run</h2>{}", facts(findings)));
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><title>{}: policies compared</title>\
         <style>{STYLE}{PAGE}</style></head>\n<body>\n{}\n</body></html>\n",
        escape(&report.model),
        sections.iter().map(|section| format!("<section>{section}</section>")).collect::<Vec<_>>().join("\n")
    )
}

fn legend(findings: &Findings) -> String {
    let item = |(i, name): (usize, &String)| {
        format!("<li><svg class=\"mark\" viewBox=\"0 0 14 14\">{}</svg>{}</li>", marker(i, 7.0, 7.0), escape(name))
    };
    format!("<ul class=\"legend\">{}</ul>", findings.policies.iter().enumerate().map(item).collect::<String>())
}

fn table(header: &[String], lines: &[Vec<String>]) -> String {
    let cells = |tag: &str, line: &[String]| {
        line.iter().map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect::<String>()
    };
    let body: String = lines.iter().map(|line| format!("<tr>{}</tr>", cells("td", line))).collect();
    format!(
        "<div class=\"wide\"><table><thead><tr>{}</tr></thead><tbody>{body}</tbody></table></div>",
        cells("th", header)
    )
}

fn facts(findings: &Findings) -> String {
    let fact = |(name, fact): (&str, String)| format!("<dt>{name}</dt><dd><code>{}</code></dd>", escape(&fact));
    format!("<dl>{}</dl>", findings.facts().into_iter().map(fact).collect::<String>())
}

/// The example, shaded by a script from the data in the page.
fn kept(traces: &[Trace]) -> String {
    let heads = |trace: &Trace| trace.live.iter().map(Vec::len).sum::<usize>();
    let policies: Vec<_> = traces
        .iter()
        .map(|trace| json!({ "name": trace.policy, "heads": heads(trace), "seen": trace.seen, "held": trace.held }))
        .collect();
    let (pieces, prompt) = traces.first().map(|trace| (trace.pieces.clone(), trace.prompt)).unwrap_or_default();
    // In a script of data only this could end it.
    let data = json!({ "pieces": pieces, "prompt": prompt, "policies": policies }).to_string().replace('<', "\\u003c");
    format!(
        "<h2>What stays of an example</h2><p>Each token is shaded by the share of KV heads that still hold it. The slider goes \
         from the start of the prompt to the last generated token.</p>\
         <div class=\"controls\"><label>policy <select id=\"who\"></select></label>\
         <label>time <input id=\"when\" type=\"range\" min=\"0\" step=\"1\"></label><output id=\"said\"></output></div>\
         <div id=\"example\"><noscript>This picture needs JavaScript.</noscript></div>\
         <script type=\"application/json\" id=\"kept\">{data}</script><script>{SLIDER}</script>"
    )
}

/// Entries at the end of the example, by layer and head, of every policy on one scale.
fn heat_maps(traces: &[Trace]) -> String {
    let maps: String = traces.iter().map(heat_map).collect();
    format!(
        "<h2>Live tokens by layer and head</h2><p>At the end of the example: a row is a layer, a column a KV head. Full shade is \
         every token seen.</p><div class=\"maps\">{maps}</div>"
    )
}

fn heat_map(trace: &Trace) -> String {
    let seen = trace.seen.last().copied().unwrap_or(1).max(1);
    let (rows, columns) = (trace.live.len(), trace.live.first().map_or(0, Vec::len));
    let mut cells = String::new();
    for (y, layer) in trace.live.iter().enumerate() {
        for (x, &live) in layer.iter().enumerate() {
            let share = live as f64 / seen as f64;
            cells += &format!(
                "<rect x=\"{x}\" y=\"{y}\" width=\"1\" height=\"1\" style=\"fill:rgba(var(--keep),{share:.3})\"><title>layer {y}, head {x}: {live} of {seen}</title></rect>"
            );
        }
    }
    let (sum, all) = (trace.live.iter().flatten().sum::<usize>(), (seen * rows * columns).max(1));
    let (name, suffix) = (base(&trace.policy), &trace.policy[base(&trace.policy).len()..]);
    format!(
        "<figure><svg class=\"map\" viewBox=\"0 0 {columns} {rows}\" preserveAspectRatio=\"none\">{cells}</svg>\
         <figcaption>{}{}: {:.0}%</figcaption></figure>",
        escape(name),
        escape(suffix),
        100.0 * sum as f64 / all as f64
    )
}
