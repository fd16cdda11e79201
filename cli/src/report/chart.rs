//! Charts as SVG that follows the colours of the page, light or dark. Small on purpose: a library would bring its own colours
//! and fonts, and this is read at the width of a phone.

use std::fmt::Write;

/// Points with axes.
#[derive(Debug, Clone, Default)]
pub(super) struct Chart {
    pub(super) title: String,
    pub(super) x: Axis,
    pub(super) y: Axis,
    pub(super) series: Vec<Series>,
    /// The best that can be had: drawn as a pale line.
    pub(super) frontier: Vec<(f64, f64)>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Axis {
    pub(super) label: String,
    /// Whether equal ratios are equal distances.
    pub(super) is_log: bool,
    /// In which figures are written.
    pub(super) unit: Unit,
}

#[derive(Debug, Clone, Copy, Default)]
pub(super) enum Unit {
    #[default]
    Number,
    Bytes,
    Percent,
}

#[derive(Debug, Clone)]
pub(super) struct Series {
    pub(super) name: String,
    /// Number of its colour and shape.
    pub(super) colour: usize,
    pub(super) points: Vec<Point>,
}

#[derive(Debug, Clone)]
pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
    /// What `y` may be.
    pub(super) interval: Option<[f64; 2]>,
    /// Beyond the series' name.
    pub(super) name: String,
}

const WIDTH: f64 = 440.0;
const HEIGHT: f64 = 300.0;
/// Of the plot: left, top, right, bottom.
const FRAME: [f64; 4] = [58.0, 34.0, 424.0, 252.0];
/// A line of the legend.
const LINE: f64 = 18.0;
/// Different ones; more series than that begin again.
const COLOURS: usize = 8;

/// Colours of text, lines and series, for pages and for pictures alone.
pub(super) const STYLE: &str = "
:root{--ink:#1d2025;--pale:#5c636e;--rule:#d9dde3;--paper:#ffffff;--wash:#f4f6f8;--keep:31,111,235;
--c0:#444b55;--c1:#d1495b;--c2:#1f6feb;--c3:#b26a00;--c4:#178a5e;--c5:#8250df;--c6:#0b8a9c;--c7:#b8327f}
@media (prefers-color-scheme:dark){:root{--ink:#e8eaed;--pale:#a2aab5;--rule:#3a4048;--paper:#15181c;--wash:#1d2126;--keep:88,166,255;
--c0:#b9c0ca;--c1:#ff8a96;--c2:#6cb0ff;--c3:#f0b04a;--c4:#4fd09a;--c5:#bf9bff;--c6:#4fcfe0;--c7:#f58ac6}}
svg text{font:12px system-ui,sans-serif;fill:var(--pale)}
svg .title{font-weight:600;fill:var(--ink)}
svg .rule{stroke:var(--rule)}
svg .frontier{stroke:var(--pale);stroke-dasharray:4 4;fill:none;opacity:.7}
svg .line{fill:none;stroke-width:1.5}
";

impl Chart {
    /// As part of a page that has [`STYLE`] and a legend of its own.
    pub(super) fn inline(&self) -> String {
        format!(
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">{}</svg>",
            escape(&self.title),
            self.body()
        )
    }

    /// As a file.
    pub(super) fn alone(&self) -> String {
        let height = HEIGHT + LINE * self.series.len() as f64 + 8.0;
        let mut legend = String::new();
        for (i, series) in self.series.iter().enumerate() {
            let y = HEIGHT + LINE * i as f64 + 4.0;
            legend += &marker(series.colour, FRAME[0] + 6.0, y);
            let _ = write!(legend, "<text x=\"{}\" y=\"{}\">{}</text>", FRAME[0] + 18.0, y + 4.0, escape(&series.name));
        }
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\">\
             <style>{STYLE}</style><rect width=\"100%\" height=\"100%\" style=\"fill:var(--paper)\"/>{}{legend}</svg>\n",
            self.body()
        )
    }

    fn body(&self) -> String {
        let [left, top, right, bottom] = FRAME;
        let points = || self.series.iter().flat_map(|series| &series.points);
        let x = Scale::new(&self.x, points().map(|point| point.x), [left + 10.0, right - 10.0]);
        let ys = points().flat_map(|point| point.interval.into_iter().flatten().chain([point.y]));
        let y = Scale::new(&self.y, ys, [bottom - 6.0, top + 6.0]);
        let mut svg = format!("<text class=\"title\" x=\"{left}\" y=\"18\">{}</text>", escape(&self.title));
        for (at, text) in y.ticks() {
            let _ = write!(svg, "<path class=\"rule\" d=\"M{left} {at:.1}H{right}\"/>");
            let _ = write!(svg, "<text text-anchor=\"end\" x=\"{}\" y=\"{:.1}\">{text}</text>", left - 6.0, at + 4.0);
        }
        for (at, text) in x.ticks() {
            let _ = write!(svg, "<path class=\"rule\" d=\"M{at:.1} {bottom}v5\"/>");
            let _ = write!(svg, "<text text-anchor=\"middle\" x=\"{at:.1}\" y=\"{}\">{text}</text>", bottom + 18.0);
        }
        let middle = (left + right) / 2.0;
        let _ = write!(
            svg,
            "<text text-anchor=\"middle\" x=\"{middle}\" y=\"{}\">{}</text>",
            HEIGHT - 10.0,
            escape(&self.x.label)
        );
        let place = |&(px, py): &(f64, f64)| format!("{:.1},{:.1}", x.place(px), y.place(py));
        let polyline = |points: &[(f64, f64)]| points.iter().map(place).collect::<Vec<_>>().join(" ");
        if self.frontier.len() > 1 {
            let _ = write!(svg, "<polyline class=\"frontier\" points=\"{}\"/>", polyline(&self.frontier));
        }
        for series in &self.series {
            let line: Vec<(f64, f64)> = series.points.iter().map(|point| (point.x, point.y)).collect();
            let colour = colour(series.colour);
            let _ = write!(svg, "<polyline class=\"line\" style=\"stroke:{colour}\" points=\"{}\"/>", polyline(&line));
            for point in &series.points {
                let (px, py) = (x.place(point.x), y.place(point.y));
                if let Some([low, high]) = point.interval {
                    let (low, high) = (y.place(low), y.place(high));
                    let _ =
                        write!(svg, "<path style=\"stroke:{colour};opacity:.45\" d=\"M{px:.1} {low:.1}V{high:.1}\"/>");
                }
                let title = format!(
                    "{}{}: {}, {}",
                    series.name,
                    point.name,
                    self.y.unit.write(point.y),
                    self.x.unit.write(point.x)
                );
                let _ = write!(svg, "<g>{}<title>{}</title></g>", marker(series.colour, px, py), escape(&title));
            }
        }
        svg
    }
}

pub(super) fn colour(number: usize) -> String {
    format!("var(--c{})", number % COLOURS)
}

/// A shape for who cannot tell the colours.
pub(super) fn marker(number: usize, x: f64, y: f64) -> String {
    let style = format!("style=\"fill:{}\"", colour(number));
    match number % 4 {
        0 => format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\" {style}/>"),
        1 => format!("<rect x=\"{:.1}\" y=\"{:.1}\" width=\"8\" height=\"8\" {style}/>", x - 4.0, y - 4.0),
        2 => format!("<path d=\"M{x:.1} {:.1}l5 9h-10z\" {style}/>", y - 5.0),
        _ => format!("<path d=\"M{x:.1} {:.1}l5.5 5.5-5.5 5.5-5.5-5.5z\" {style}/>", y - 5.5),
    }
}

/// From figures to places.
struct Scale<'a> {
    axis: &'a Axis,
    range: [f64; 2],
    places: [f64; 2],
}

impl<'a> Scale<'a> {
    fn new(axis: &'a Axis, values: impl Iterator<Item = f64>, places: [f64; 2]) -> Self {
        let values: Vec<f64> = values.filter(|x| x.is_finite() && (!axis.is_log || *x > 0.0)).collect();
        let (low, high) =
            values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), &x| (low.min(x), high.max(x)));
        let range = match axis.unit {
            _ if values.is_empty() => [0.0, 1.0],
            Unit::Percent => [0.0, 1.0],
            _ if axis.is_log => [low / 1.05, high * 1.05],
            // What is near 0 is shown from there: lengths can be compared.
            _ if low >= 0.0 && low < high * 0.6 => [0.0, high],
            _ if low == high => [low - 0.5 * low.abs().max(1.0), high + 0.5 * high.abs().max(1.0)],
            _ => [low, high],
        };
        Self { axis, range, places }
    }

    fn place(&self, value: f64) -> f64 {
        let of = |x: f64| if self.axis.is_log { x.max(f64::MIN_POSITIVE).ln() } else { x };
        let [low, high] = self.range.map(of);
        let share = if high > low { (of(value) - low) / (high - low) } else { 0.5 };
        self.places[0] + share.clamp(-0.05, 1.05) * (self.places[1] - self.places[0])
    }

    /// Round figures on the axis with their places.
    fn ticks(&self) -> Vec<(f64, String)> {
        let [low, high] = self.range;
        let values: Vec<f64> = if self.axis.is_log {
            let doubled = (0..64).map(|i| low.max(1e-12).log2().ceil() + i as f64).map(f64::exp2);
            let all: Vec<f64> = doubled.take_while(|x| *x <= high).collect();
            let every = all.len().div_ceil(5).max(1);
            all.into_iter().step_by(every).collect()
        } else {
            let step = self.axis.unit.step((high - low) / 4.0);
            let first = (low / step).ceil() * step;
            (0..12).map(|i| first + i as f64 * step).take_while(|x| *x <= high * (1.0 + 1e-9)).collect()
        };
        values.into_iter().map(|x| (self.place(x), self.axis.unit.write(x))).collect()
    }
}

impl Unit {
    /// A round distance, no less than this.
    fn step(self, rough: f64) -> f64 {
        if matches!(self, Self::Bytes) {
            return rough.log2().ceil().exp2();
        }
        let unit = 10f64.powf(rough.log10().floor());
        [1.0, 2.0, 2.5, 5.0].into_iter().map(|n| n * unit).find(|step| *step >= rough).unwrap_or(10.0 * unit)
    }

    pub(super) fn write(self, x: f64) -> String {
        match self {
            Self::Bytes => crate::table::bytes(x),
            Self::Percent => format!("{:.0}%", 100.0 * x),
            Self::Number if x == 0.0 => "0".into(),
            Self::Number => {
                let digits = (2.0 - x.abs().log10().floor()).clamp(0.0, 6.0) as usize;
                let text = format!("{x:.digits$}");
                if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').into() } else { text }
            }
        }
    }
}

/// For text and attributes of HTML and SVG.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;").replace('\'', "&#39;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scale(axis: &Axis, values: [f64; 2]) -> Scale<'_> {
        Scale::new(axis, values.into_iter(), [0.0, 100.0])
    }

    #[test]
    fn equal_steps_are_equal_distances_and_ratios_where_they_count() {
        let (linear, log) = (Axis::default(), Axis { is_log: true, ..Axis::default() });
        let at = |axis: &Axis, x: f64| scale(axis, [1.0, 16.0]).place(x);
        assert!((at(&linear, 8.0) - at(&linear, 4.0) - (at(&linear, 16.0) - at(&linear, 12.0))).abs() < 1e-9);
        assert!((at(&log, 4.0) - at(&log, 2.0) - (at(&log, 16.0) - at(&log, 8.0))).abs() < 1e-9);
        assert!(at(&linear, 0.0).abs() < 1e-9, "from 0");
        assert!((scale(&linear, [90.0, 100.0]).place(90.0)).abs() < 1e-9, "but not from far away");
    }

    #[test]
    fn ticks_are_round_and_inside() {
        for values in [[0.0, 1.0], [0.0, 0.03], [18.0, 21.0], [1.0, 700.0], [5.0, 5.0], [0.0, 0.0]] {
            let axis = Axis::default();
            let ticks = scale(&axis, values).ticks();
            assert!((2..=8).contains(&ticks.len()), "{values:?}: {ticks:?}");
            assert!(ticks.iter().all(|(at, _)| (-0.1..=100.1).contains(at)), "{values:?}: {ticks:?}");
        }
        let bytes = Axis { unit: Unit::Bytes, ..Axis::default() };
        let written: Vec<String> = scale(&bytes, [1.8e6, 8e6]).ticks().into_iter().map(|(_, text)| text).collect();
        assert_eq!(written, ["0 B", "2.0 MiB", "4.0 MiB", "6.0 MiB"]);
        let written = |x: f64| Unit::Number.write(x);
        assert_eq!([0.0, 0.25, 0.0312, 1234.0, 19.27].map(written), ["0", "0.25", "0.0312", "1234", "19.3"]);
    }

    #[test]
    fn what_is_written_is_no_markup() {
        assert_eq!(escape("<a href=\"x\">&'"), "&lt;a href=&quot;x&quot;&gt;&amp;&#39;");
    }
}
