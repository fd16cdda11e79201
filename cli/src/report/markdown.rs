//! `report.md`, for pull requests.

use super::{DIFFERENCES, Findings};

pub(super) fn page(findings: &Findings) -> String {
    let mut text = format!("# {}: policies compared\n\n{}\n\n", findings.report.model, findings.figures);
    for picture in &findings.pictures {
        text += &format!("![{}]({})\n", picture.chart.title, picture.file());
    }
    if !findings.differences.is_empty() {
        text +=
            &format!("\n## Differences\n\n| {} |\n|{}\n", DIFFERENCES.join(" | "), "---|".repeat(DIFFERENCES.len()));
        for line in &findings.differences {
            text += &format!("| {} |\n", line.join(" | "));
        }
    }
    text += "\n## The run\n\n";
    for (name, fact) in findings.facts() {
        text += &format!("- {name}: `{fact}`\n");
    }
    text
}
