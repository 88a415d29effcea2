//! Text tables: aligned columns, two spaces apart, without lines.

use std::fmt;

use anstream::adapter::strip_str;
use owo_colors::OwoColorize;
use unicode_width::UnicodeWidthStr;

/// A table with a header. Each column is as wide as its widest cell; colour codes have no width.
#[derive(Debug, Clone)]
pub struct Table<const COLUMNS: usize> {
    header: [&'static str; COLUMNS],
    rows: Vec<[String; COLUMNS]>,
}

impl<const COLUMNS: usize> Table<COLUMNS> {
    /// An empty table.
    pub fn new(header: [&'static str; COLUMNS]) -> Self {
        Self {
            header,
            rows: Vec::new(),
        }
    }

    /// Adds a row. An empty cell is printed as `-`, so that programs can split columns.
    pub fn row(&mut self, mut cells: [String; COLUMNS]) {
        for cell in &mut cells {
            if cell.is_empty() {
                "-".clone_into(cell);
            }
        }
        self.rows.push(cells);
    }

    fn widths(&self) -> [usize; COLUMNS] {
        std::array::from_fn(|column| {
            self.rows
                .iter()
                .map(|row| width(&row[column]))
                .chain([width(self.header[column])])
                .max()
                .unwrap_or(0)
        })
    }
}

impl<const COLUMNS: usize> fmt::Display for Table<COLUMNS> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths = self.widths();
        let header = self.header.map(|title| title.to_uppercase().dimmed().to_string());
        for (number, row) in [&header].into_iter().chain(&self.rows).enumerate() {
            if number > 0 {
                formatter.write_str("\n")?;
            }
            for (column, cell) in row.iter().enumerate() {
                formatter.write_str(cell)?;
                if column + 1 < COLUMNS {
                    write!(formatter, "{:1$}", "", widths[column] - width(cell) + 2)?;
                }
            }
        }
        Ok(())
    }
}

/// The width of `text` in terminal columns.
pub fn width(text: &str) -> usize {
    strip_str(text).map(UnicodeWidthStr::width).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_with_colours_and_wide_characters() {
        let mut table = Table::new(["name", "state", "note"]);
        table.row(["漢字".to_owned(), "ready".green().to_string(), "a".to_owned()]);
        table.row(["decoder10".to_owned(), String::new(), "b".to_owned()]);
        assert_eq!(
            strip_str(&table.to_string()).to_string(),
            "NAME       STATE  NOTE\n漢字       ready  a\ndecoder10  -      b"
        );
    }
}
