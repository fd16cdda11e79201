//! `kvpolicy plot`: the curves of trainings.

use anyhow::{Context, Result};
use kvpolicy_candle::retrofit::StepRecord;
use plotters::{
    coord::Shift,
    prelude::{
        BLACK, ChartBuilder, Color, DrawingArea, IntoDrawingArea, LineSeries, Palette, Palette99, PathElement,
        RGBAColor, SVGBackend, SeriesLabelPosition, ShapeStyle, WHITE,
    },
};
use std::path::{Path, PathBuf};

/// Of the picture, in pixels.
const SIZE: (u32, u32) = (960, 720);

/// Whatever a viewer has without serifs.
const FONT: (&str, u32) = ("sans-serif", 15);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Logs that `retrofit` wrote, to be drawn in one picture.
    #[arg(required = true)]
    logs: Vec<PathBuf>,
    /// The picture, SVG.
    #[arg(long)]
    out: PathBuf,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    draw(&args.logs, &args.out)?;
    println!("{}", args.out.display());
    Ok(())
}

/// Draws divergence and compression of these logs into a file.
pub(crate) fn draw(logs: &[PathBuf], out: &Path) -> Result<()> {
    let runs = logs.iter().map(|path| Run::read(path)).collect::<Result<Vec<_>>>()?;
    let picture = picture(&runs).context("the picture cannot be drawn")?;
    std::fs::write(out, picture).with_context(|| out.display().to_string())
}

/// A training, by steps.
struct Run {
    name: String,
    steps: Vec<StepRecord>,
    /// How much of a context the share of evictions is taken of: what the window does not hold.
    evictable: f64,
}

type Points = Vec<(f64, f64)>;

/// A line, and what the legend calls it.
struct Curve {
    points: Points,
    colour: RGBAColor,
    label: Option<String>,
}

impl Run {
    fn read(path: &Path) -> Result<Self> {
        let steps = StepRecord::read(path)?;
        let most = steps.iter().max_by(|a, b| a.evicted.total_cmp(&b.evicted));
        let evictable = most.map_or(1.0, |step| (1.0 - 1.0 / step.compression) / step.evicted);
        // Nothing was evicted in any step.
        let evictable = if evictable.is_finite() { evictable } else { 1.0 };
        Ok(Self { name: path.display().to_string(), steps, evictable })
    }

    fn points(&self, value: impl Fn(&StepRecord) -> f64) -> Points {
        let all = self.steps.iter().map(|step| (step.step as f64, value(step)));
        all.filter(|(_, value)| value.is_finite()).collect()
    }

    /// The compression that soft decisions would make.
    fn soft(&self, step: &StepRecord) -> f64 {
        1.0 / (1.0 - step.soft * self.evictable)
    }

    fn divergence(&self, colour: RGBAColor) -> Curve {
        Curve { points: self.points(|step| step.divergence), colour, label: None }
    }

    fn compression(&self, colour: RGBAColor) -> [Curve; 3] {
        let curve = |points, colour| Curve { points, colour, label: None };
        let hard = curve(self.points(|step| step.compression), colour);
        [
            curve(self.points(|step| step.target), BLACK.mix(0.6)),
            curve(self.points(|step| self.soft(step)), colour.mix(0.35)),
            Curve { label: Some(self.name.clone()), ..hard },
        ]
    }
}

fn picture(runs: &[Run]) -> Result<String> {
    let coloured = || runs.iter().enumerate().map(|(i, run)| (run, Palette99::pick(i).to_rgba()));
    let divergence: Vec<Curve> = coloured().map(|(run, colour)| run.divergence(colour)).collect();
    let compression: Vec<Curve> = coloured().flat_map(|(run, colour)| run.compression(colour)).collect();
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let (above, below) = root.split_vertically(SIZE.1 / 2);
        chart(&above, "KL, nats per token", &divergence)?;
        chart(&below, "compression: hard decisions, soft ones (pale), asked for (grey)", &compression)?;
        root.present()?;
    }
    Ok(svg)
}

fn chart(area: &DrawingArea<SVGBackend, Shift>, title: &str, curves: &[Curve]) -> Result<()> {
    let largest = |of: fn(&(f64, f64)) -> f64| curves.iter().flat_map(|c| &c.points).map(of).fold(1e-6, f64::max);
    let (right, top) = (largest(|point| point.0), largest(|point| point.1) * 1.05);
    let mut chart = ChartBuilder::on(area)
        .caption(title, FONT)
        .margin(8)
        .x_label_area_size(28)
        .y_label_area_size(52)
        .build_cartesian_2d(0.0..right, 0.0..top)?;
    chart.configure_mesh().light_line_style(WHITE.mix(0.0)).label_style(FONT).x_desc("step").draw()?;
    for Curve { points, colour, label } in curves {
        let style = ShapeStyle { color: *colour, filled: false, stroke_width: 1 };
        let series = chart.draw_series(LineSeries::new(points.iter().copied(), style))?;
        if let Some(label) = label {
            series.label(label).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        }
    }
    if curves.iter().any(|curve| curve.label.is_some()) {
        // Compression grows, which leaves this corner free.
        let mut legend = chart.configure_series_labels();
        legend.position(SeriesLabelPosition::LowerRight).label_font(FONT).background_style(WHITE.mix(0.8)).draw()?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn log(dir: &Path, name: &str, steps: u64, divergence: impl Fn(u64) -> f64) -> PathBuf {
        let line = |step: u64| {
            let evicted = 0.5 * step as f64 / steps as f64;
            let record = StepRecord {
                step,
                tokens: step * 100,
                divergence: divergence(step),
                compression_loss: 0.0,
                evicted,
                soft: evicted / 2.0,
                compression: 1.0 / (1.0 - 0.8 * evicted),
                target: 2.0,
                rate: 1e-3,
                gradient: 1.0,
                seconds: step as f64,
            };
            serde_json::to_string(&record).unwrap() + "\n"
        };
        let path = dir.join(name);
        std::fs::write(&path, (1..=steps).map(line).collect::<String>()).unwrap();
        path
    }

    /// Lines of more than two points: the curves, in the order in which they are drawn.
    fn curves(svg: &str) -> Vec<Vec<(f64, f64)>> {
        let point = |text: &str| {
            let (x, y) = text.split_once(',').unwrap();
            (x.parse().unwrap(), y.parse().unwrap())
        };
        let lines = svg.split("<polyline").skip(1).map(|rest| {
            let points = rest.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
            points.split_whitespace().map(point).collect::<Vec<_>>()
        });
        lines.filter(|points| points.len() > 2).collect()
    }

    #[test]
    fn every_step_is_a_point_of_every_curve() {
        let dir = tempfile::tempdir().unwrap();
        let logs = [log(dir.path(), "a.jsonl", 20, |s| s as f64), log(dir.path(), "b.jsonl", 40, |s| 80.0 - s as f64)];
        let out = dir.path().join("both.svg");
        draw(&logs, &out).unwrap();
        let svg = std::fs::read_to_string(out).unwrap();
        assert!(svg.contains("a.jsonl") && svg.contains("b.jsonl") && svg.contains("nats per token"));
        let curves = curves(&svg);
        let lengths: Vec<usize> = curves.iter().map(Vec::len).collect();
        assert_eq!(lengths, [20, 40, 20, 20, 20, 40, 40, 40]);
        // Both axes are linear, and larger values stand higher.
        let at = |curve: usize, i: usize| curves[curve][i];
        let [(x0, low), (x1, high)] = [at(0, 0), at(0, 19)];
        let [(_, start), (_, end)] = [at(1, 0), at(1, 39)];
        assert!(x0 < x1 && high < low && start < end);
        assert!(((low - high) / 19.0 - (end - start) / 39.0).abs() < 0.2, "the same scale for both logs");
        let (target, soft, hard) = (&curves[2], &curves[3], &curves[4]);
        assert!(target.iter().all(|point| point.1 == target[0].1));
        // A quarter evicted of what can be: 1 / (1 - 0.8 / 4) softly, and hard at the step in the middle.
        assert_eq!(soft[19].1, hard[9].1);
        assert!(hard[19].1 < soft[19].1 && target[0].1 < hard[19].1);
    }

    #[test]
    fn one_step_without_evictions_can_be_drawn() {
        let dir = tempfile::tempdir().unwrap();
        let path = log(dir.path(), "one.jsonl", 1, |_| 0.0);
        let text = std::fs::read_to_string(&path).unwrap().replace("\"evicted\":0.5", "\"evicted\":0.0");
        std::fs::write(&path, text).unwrap();
        draw(&[path], &dir.path().join("one.svg")).unwrap();
    }

    #[test]
    fn a_bad_log_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = log(dir.path(), "a.jsonl", 3, |_| 0.0);
        let out = dir.path().join("x.svg");
        let refused = |words: &[&str]| {
            let error = format!("{:#}", draw(std::slice::from_ref(&path), &out).unwrap_err());
            words.iter().for_each(|word| assert!(error.contains(word), "`{error}` does not say `{word}`"));
            assert!(!out.exists());
        };
        let whole = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, whole.replacen("\"step\":2", "\"step\":\"two\"", 1)).unwrap();
        refused(&["a.jsonl", "line 2", "two"]);
        std::fs::write(&path, &whole[..whole.len() - 20]).unwrap();
        refused(&["a.jsonl", "line 3"]);
        std::fs::write(&path, "\n").unwrap();
        refused(&["a.jsonl", "has no steps"]);
        std::fs::remove_file(&path).unwrap();
        refused(&["a.jsonl"]);
    }
}
