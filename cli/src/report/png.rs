//! Pictures as PNG, for where SVG is not shown.

use super::{chart::STYLE, pictures::Picture, write_file};
use anyhow::{Context, Result};
use resvg::{
    tiny_skia::{Pixmap, Transform},
    usvg::{
        Options, Tree,
        fontdb::{Database, Family, Query},
    },
};
use std::{path::Path, sync::Arc};

/// Pixels for a unit of an SVG.
const SCALE: f32 = 2.0;

/// A file beside each SVG.
pub(super) fn write(dir: &Path, pictures: &[Picture]) -> Result<()> {
    let options = Options { fontdb: Arc::new(fonts()?), ..Options::default() };
    pictures.iter().try_for_each(|picture| {
        let name = format!("{}.png", picture.name);
        write_file(dir, &name, render(&picture.chart.alone(), &options).context(name.clone())?)
    })
}

/// Those of the system, one of which writes what asks for no other.
fn fonts() -> Result<Database> {
    let mut fonts = Database::new();
    fonts.load_system_fonts();
    let is_known = fonts.query(&Query { families: &[Family::SansSerif], ..Query::default() }).is_some();
    if !is_known {
        let named = fonts.faces().find_map(|face| face.families.first().map(|(name, _)| name.clone()));
        fonts.set_sans_serif_family(named.context("PNG pictures need a font, and none is installed")?);
    }
    Ok(fonts)
}

fn render(svg: &str, options: &Options) -> Result<Vec<u8>> {
    let tree = Tree::from_str(&settled(svg), options)?;
    let size = tree.size();
    let pixels = |length: f32| (length * SCALE).ceil() as u32;
    let mut pixmap = Pixmap::new(pixels(size.width()), pixels(size.height())).context("a picture without a size")?;
    resvg::render(&tree, Transform::from_scale(SCALE, SCALE), &mut pixmap.as_mut());
    Ok(pixmap.encode_png()?)
}

/// A picture in the light colours, without what only browsers know: variables, media and their own font.
fn settled(svg: &str) -> String {
    let rules: String = STYLE.lines().filter(|line| line.starts_with("svg ")).collect::<Vec<_>>().join("\n");
    let light = STYLE.split_once(":root{").and_then(|(_, rest)| rest.split_once('}')).map_or("", |(light, _)| light);
    let variables = light.split(';').filter_map(|variable| variable.trim().split_once(':'));
    let plain = svg.replace(STYLE, &rules).replace("system-ui,sans-serif", "sans-serif");
    variables.fold(plain, |svg, (name, value)| svg.replace(&format!("var({name})"), value))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::report::chart::{Axis, Chart, Point, Series};

    fn chart(colour: usize) -> Chart {
        let point = |x, y| Point { x, y, interval: None, name: String::new() };
        let series = Series { name: "a policy".into(), colour, points: vec![point(1.0, 2.0), point(3.0, 4.0)] };
        Chart {
            title: "A title".into(),
            x: Axis::default(),
            y: Axis::default(),
            series: vec![series],
            frontier: vec![(1.0, 2.0), (3.0, 4.0)],
        }
    }

    fn drawn(chart: &Chart) -> Pixmap {
        let options = Options { fontdb: Arc::new(fonts().unwrap()), ..Options::default() };
        Pixmap::decode_png(&render(&chart.alone(), &options).unwrap()).unwrap()
    }

    fn count(pixmap: &Pixmap, rgb: [u8; 3]) -> usize {
        let is_it = |p: &&resvg::tiny_skia::PremultipliedColorU8| [p.red(), p.green(), p.blue()] == rgb;
        pixmap.pixels().iter().filter(is_it).count()
    }

    #[test]
    fn a_picture_is_drawn_on_paper_in_its_colours_with_its_words() {
        let (picture, other) = (drawn(&chart(1)), drawn(&chart(2)));
        assert_eq!(picture.width(), 880);
        assert!(picture.pixels().iter().all(|pixel| pixel.alpha() == 255));
        let [paper, own] = [[255; 3], [0xd1, 0x49, 0x5b]].map(|rgb| count(&picture, rgb));
        assert!(paper > picture.pixels().len() / 2 && own > 100, "{paper} {own}");
        assert_eq!(count(&other, [0xd1, 0x49, 0x5b]), 0);
        let untitled = drawn(&Chart { title: String::new(), ..chart(1) });
        assert!(count(&untitled, [255; 3]) > paper, "words take ink");
        assert_eq!(count(&untitled, [0; 3]), 0, "black is what has no colour");
    }

    #[test]
    fn nothing_is_left_that_only_browsers_know() {
        let svg = settled(&chart(7).alone());
        assert!(svg.contains("#b8327f") && svg.contains(".frontier"));
        for word in ["var(", "@media", ":root", "system-ui"] {
            assert!(!svg.contains(word), "{word}");
        }
    }
}
