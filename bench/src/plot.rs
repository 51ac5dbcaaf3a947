//! Lines over two axes, as SVG. The same lines give the same bytes.

use std::fmt::Write as _;

/// A line and its name.
#[derive(Clone, Debug)]
pub struct Line {
    /// In the legend.
    pub name: String,
    /// By rising x.
    pub points: Vec<(f64, f64)>,
}

/// A picture.
#[derive(Clone, Debug)]
pub struct Plot {
    /// Over it.
    pub title: String,
    /// Under it.
    pub x: String,
    /// Left of it.
    pub y: String,
    /// What it shows.
    pub lines: Vec<Line>,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 32.0;
const BOTTOM: f64 = 44.0;
const TICKS: usize = 5;
/// Told apart also by who does not see all colours.
const COLOURS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"];

impl Plot {
    /// The picture as text.
    #[must_use]
    pub fn svg(&self) -> String {
        let all = || self.lines.iter().flat_map(|line| &line.points);
        let range = |of: fn(&(f64, f64)) -> f64| {
            let (low, high) = all()
                .map(of)
                .filter(|value| value.is_finite())
                .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
                    (low.min(value), high.max(value))
                });
            if low < high { (low, high) } else { (0.0, 1.0) }
        };
        let (xs, ys) = (range(|point| point.0), range(|point| point.1));
        let (xs, ys) = ((xs.0.min(0.0), xs.1), (ys.0.min(0.0), ys.1));
        let x = |value: f64| LEFT + (value - xs.0) / (xs.1 - xs.0) * (WIDTH - LEFT - RIGHT);
        let y =
            |value: f64| HEIGHT - BOTTOM - (value - ys.0) / (ys.1 - ys.0) * (HEIGHT - TOP - BOTTOM);
        let mut svg = String::new();
        let mut put = |text: String| _ = writeln!(svg, "{text}");
        put(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">"
        ));
        put(format!("<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#ffffff\"/>"));
        put(text(LEFT, 20.0, "start", &self.title));
        put(text((LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 8.0, "middle", &self.x));
        put(text(4.0, TOP - 4.0, "start", &self.y));
        for tick in 0..=TICKS {
            let share = tick as f64 / TICKS as f64;
            let (at_x, at_y) = (xs.0 + share * (xs.1 - xs.0), ys.0 + share * (ys.1 - ys.0));
            put(format!(
                "<path d=\"M{:.1} {:.1}H{:.1}\" stroke=\"#dddddd\"/>",
                LEFT,
                y(at_y),
                WIDTH - RIGHT
            ));
            put(text(LEFT - 6.0, y(at_y) + 4.0, "end", &number(at_y)));
            put(text(x(at_x), HEIGHT - BOTTOM + 16.0, "middle", &number(at_x)));
        }
        for ((line, colour), row) in self.lines.iter().zip(COLOURS.iter().cycle()).zip(0..) {
            let mut path = String::new();
            for (at, point) in line.points.iter().filter(|point| point.1.is_finite()).enumerate() {
                let step = if at == 0 { 'M' } else { 'L' };
                _ = write!(path, "{step}{:.1} {:.1}", x(point.0), y(point.1));
            }
            put(format!(
                "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>"
            ));
            let legend = TOP + 8.0 + f64::from(row) * 18.0;
            let start = WIDTH - RIGHT + 12.0;
            put(format!(
                "<path d=\"M{start:.1} {legend:.1}h18\" stroke=\"{colour}\" stroke-width=\"2\"/>"
            ));
            put(text(start + 24.0, legend + 4.0, "start", &line.name));
        }
        put("</svg>".into());
        svg
    }
}

fn text(x: f64, y: f64, anchor: &str, text: &str) -> String {
    let escaped = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{escaped}</text>")
}

fn number(value: f64) -> String {
    match value.abs() {
        zero if zero < 1e-12 => "0".into(),
        small if small < 10.0 => format!("{value:.2}"),
        middle if middle < 10_000.0 => format!("{value:.0}"),
        _ => format!("{:.0}k", value / 1000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_has_every_line_and_its_name_and_is_the_same_each_time() {
        let line = |name: &str, slope: f64| Line {
            name: name.into(),
            points: (0..10).map(|x| (f64::from(x), f64::from(x) * slope)).collect(),
        };
        let lines = vec![line("a < b", 1.0), line("async", f64::NAN), line("sync", 2.0)];
        let plot = Plot { title: "t".into(), x: "s".into(), y: "loss".into(), lines };
        let svg = plot.svg();
        assert!(svg.contains("a &lt; b") && svg.contains("sync") && !svg.contains("NaN"));
        assert_eq!(svg.matches("stroke-width").count(), 6);
        assert_eq!(svg, plot.svg());
    }
}
