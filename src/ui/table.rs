//! Plain aligned tables, for terminals and for pipes alike.

use std::fmt::Write;

/// Rows under a header, columns as wide as their widest cell, two spaces apart, no trailing spaces or line end.
pub fn render(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let header: Vec<String> = header.iter().map(|cell| (*cell).to_owned()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(header).chain(rows).collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            rows.iter()
                .filter_map(|row| row.get(column))
                .map(|cell| width(cell))
                .max()
                .unwrap_or(0)
        })
        .collect();
    let lines: Vec<String> = rows
        .iter()
        .map(|row| {
            let mut line = String::new();
            for (cell, column_width) in row.iter().zip(&widths) {
                let padding = column_width - width(cell) + 2;
                let _ = write!(line, "{cell}{:padding$}", "");
            }
            line.truncate(line.trim_end().len());
            line
        })
        .collect();
    lines.join("\n")
}

/// Columns that a text takes on a terminal, near enough: what xpyd prints in tables has no wide characters.
fn width(text: &str) -> usize {
    text.chars().count()
}

#[cfg(test)]
mod tests {
    use super::render;

    #[test]
    fn columns_are_aligned_and_lines_do_not_end_in_spaces() {
        let table = render(&["A", "LONG"], vec![vec!["one".into(), "1".into()], vec!["×".into()]]);
        assert_eq!(table, "A    LONG\none  1\n×");
    }
}
