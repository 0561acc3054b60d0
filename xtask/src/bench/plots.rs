//! The report's pictures.

use std::path::Path;

use anyhow::anyhow;
use plotters::{
    coord::{
        Shift,
        ranged1d::{AsRangedCoord, Ranged, ValueFormatter},
    },
    prelude::*,
};
use serde_json::Value;

use super::{
    failover, load, memory,
    report::{find, taken},
    rivals::KINDS,
    world::Topology,
};

/// Draws one of them, if there is anything to draw.
type Draw = fn(&[Value], &Path) -> anyhow::Result<bool>;

const SIZE: (u32, u32) = (900, 480);

/// Draws what there are rows for; the names of the files and what they show.
pub(super) fn draw(rows: &[Value], dir: &Path) -> anyhow::Result<Vec<(&'static str, &'static str)>> {
    let pictures: [(&str, &str, Draw); 4] = [
        ("latency.svg", "Latency of HTTP keep-alive under open-loop load", latency),
        ("failover.svg", "Failed requests after a backend went", timeline),
        ("memory.svg", "Memory by the number of tasks", memory),
        ("scale.svg", "One change and a cold load by the number of backends", scale),
    ];
    let mut drawn = Vec::new();
    for (file, title, draw) in pictures {
        if draw(rows, &dir.join(file))? {
            drawn.push((file, title));
        }
    }
    Ok(drawn)
}

fn color(arm: &str) -> RGBColor {
    let colors = [
        RGBColor(30, 30, 30),
        RGBColor(214, 39, 40),
        RGBColor(31, 119, 180),
        RGBColor(23, 190, 207),
        RGBColor(148, 103, 189),
        RGBColor(255, 127, 14),
        RGBColor(44, 160, 44),
        RGBColor(188, 189, 34),
        RGBColor(150, 150, 150),
    ];
    colors[KINDS.iter().position(|kind| kind.name == arm).unwrap_or(0)]
}

type Line<'a> = (&'a str, RGBColor, Vec<(f64, f64)>);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn area(path: &Path) -> anyhow::Result<Area<'_>> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(bad)?;
    Ok(area)
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn bad<E: std::error::Error + Send + Sync>(error: DrawingAreaErrorKind<E>) -> anyhow::Error {
    anyhow!("cannot draw: {error}")
}

fn number(row: &Value) -> Option<f64> {
    row["value"].as_f64()
}

/// Lines over an area, both axes logarithmic or the first one not.
fn lines<X>(
    area: &Area<'_>,
    title: &str,
    axes: [&str; 2],
    x: X,
    ticks: usize,
    lines: &[Line<'_>],
) -> anyhow::Result<()>
where
    X: AsRangedCoord<Value = f64>,
    X::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let values = || lines.iter().flat_map(|(_, _, points)| points.iter().map(|(_, y)| *y));
    let (low, high) = (values().fold(f64::MAX, f64::min), values().fold(f64::MIN, f64::max));
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d(x, (low / 1.5..high * 1.5).log_scale())
        .map_err(bad)?;
    chart
        .configure_mesh()
        .x_desc(axes[0])
        .y_desc(axes[1])
        .x_labels(ticks)
        .light_line_style(WHITE.mix(0.0))
        .draw()
        .map_err(bad)?;
    for (name, color, points) in lines {
        let color = *color;
        chart
            .draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)).point_size(3))
            .map_err(bad)?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()
        .map_err(bad)
}

fn latency(rows: &[Value], path: &Path) -> anyhow::Result<bool> {
    let of = |percentile: &str| -> Vec<Line<'_>> {
        let line = |arm: &'static str| {
            let point = |(load, name): &(u32, &str)| {
                let measure = format!("{}{name}: {percentile}", load::PREFIX);
                let row = find(rows, &measure, Topology::Namespaces.name(), arm)?;
                Some((f64::from(*load), taken(row)?))
            };
            (arm, color(arm), load::LOADS.iter().filter_map(point).collect::<Vec<_>>())
        };
        KINDS.iter().map(|kind| line(kind.name)).filter(|(_, _, points)| !points.is_empty()).collect()
    };
    let (p50, p99) = (of("p50"), of("p99"));
    if p50.is_empty() {
        return Ok(false);
    }
    let area = area(path)?;
    let (left, right) = area.split_horizontally(SIZE.0 / 2);
    for (side, name, drawn) in [(left, "p50", p50), (right, "p99", p99)] {
        let axes = ["% of direct's maximum", "microseconds"];
        lines(&side, name, axes, 20.0..80.0, 4, &drawn)?;
    }
    area.present().map_err(bad)?;
    Ok(true)
}

fn memory(rows: &[Value], path: &Path) -> anyhow::Result<bool> {
    let of = |services: usize| -> Vec<Line<'_>> {
        let measure = format!("{}{services} services x 10: PSS and maps", memory::PREFIX);
        let line = |arm: &'static str| {
            let point = |tasks: &usize| {
                Some((*tasks as f64, number(find(rows, &measure, &format!("{tasks} tasks"), arm)?)?))
            };
            (arm, color(arm), memory::TASKS.iter().filter_map(point).collect::<Vec<_>>())
        };
        KINDS.iter().map(|kind| line(kind.name)).filter(|(_, _, points)| !points.is_empty()).collect()
    };
    let all = memory::SERVICES.map(|services| (services, of(services)));
    if all.iter().all(|(_, drawn)| drawn.is_empty()) {
        return Ok(false);
    }
    let area = area(path)?;
    let (left, right) = area.split_horizontally(SIZE.0 / 2);
    for (side, (services, drawn)) in
        [left, right].into_iter().zip(all).filter(|(_, (_, drawn))| !drawn.is_empty())
    {
        let title = format!("{services} services");
        lines(&side, &title, ["tasks", "MiB"], (0.9..110.0).log_scale(), 4, &drawn)?;
    }
    area.present().map_err(bad)?;
    Ok(true)
}

fn scale(rows: &[Value], path: &Path) -> anyhow::Result<bool> {
    let line = |measure: &'static str, color: RGBColor, to_ms: f64| {
        let point = |backends: u32| {
            let row = find(rows, &format!("scale: {measure}"), &format!("1 x {backends}"), "mesh")?;
            Some((f64::from(backends), number(row)? / to_ms))
        };
        (measure, color, [1, 10, 1000, 100_000, 1_000_000].into_iter().filter_map(point).collect::<Vec<_>>())
    };
    let drawn = [
        line("cold load", color("mesh"), 1.0),
        line("one change visible, p50", color("envoy-pair-http"), 1e3),
        line("one change visible, p99", color("haproxy"), 1e3),
    ];
    if drawn.iter().any(|(_, _, points)| points.is_empty()) {
        return Ok(false);
    }
    let area = area(path)?;
    let axes = ["backends of one service", "milliseconds"];
    lines(&area, "Size", axes, (0.9..1.1e6).log_scale(), 7, &drawn)?;
    area.present().map_err(bad)?;
    Ok(true)
}

/// A row of dots for each arm: failed requests in each tenth of a second.
fn timeline(rows: &[Value], path: &Path) -> anyhow::Result<bool> {
    let events = [failover::Event::Killed, failover::Event::BlackHoled];
    let measure = |event| failover::measure_of(event, failover::CLIENTS[0].0, failover::VALUES[0]);
    let seen = |event, arm: &str| find(rows, &measure(event), Topology::Namespaces.name(), arm);
    let arms: Vec<_> =
        KINDS.iter().rev().filter(|kind| events.iter().any(|e| seen(*e, kind.name).is_some())).collect();
    if arms.is_empty() {
        return Ok(false);
    }
    let area = area(path)?;
    let (left, right) = area.split_horizontally(SIZE.0 / 2);
    for (side, event) in [left, right].into_iter().zip(events) {
        let names: Vec<&str> = arms.iter().map(|kind| kind.name).collect();
        let mut chart = ChartBuilder::on(&side)
            .caption(event.name(), ("sans-serif", 18))
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(110)
            .build_cartesian_2d(-1.0..10.0, -0.5..names.len() as f64 - 0.5)
            .map_err(bad)?;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
        let name = |y: &f64| {
            let whole = y.fract() == 0.0 && *y >= 0.0;
            whole
                .then(|| names.get(*y as usize))
                .flatten()
                .map_or_else(String::new, |name| (*name).to_owned())
        };
        chart
            .configure_mesh()
            .disable_y_mesh()
            .light_line_style(WHITE.mix(0.0))
            .x_desc("seconds after the event")
            .y_labels(2 * names.len() + 1)
            .y_label_formatter(&name)
            .draw()
            .map_err(bad)?;
        for (y, arm) in names.iter().enumerate() {
            let bins = seen(event, arm).and_then(|row| row["timeline"].as_array()).into_iter().flatten();
            let dot = |bin: &Value| {
                let (at, count) = (bin[0].as_f64()? / 1e3, bin[1].as_f64()?);
                Some(Circle::new(
                    (at, y as f64),
                    (count.sqrt() * 3.0).min(12.0),
                    color(arm).mix(0.6).filled(),
                ))
            };
            chart.draw_series(bins.filter_map(dot)).map_err(bad)?;
        }
    }
    area.present().map_err(bad)?;
    Ok(true)
}
