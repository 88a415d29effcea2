//! Tables of text: aligned columns, two spaces apart, no lines.

use std::fmt;

use anstream::adapter::strip_str;
use owo_colors::OwoColorize;
use unicode_width::UnicodeWidthStr;

/// A table with a header. Columns are as wide as their widest cell; colours in a cell count nothing.
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

    /// Adds a row. An empty cell is shown as `-`, so that columns can be told apart by programs too.
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

/// Columns of a terminal that `text` takes.
pub fn width(text: &str) -> usize {
    strip_str(text).map(UnicodeWidthStr::width).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_whatever_the_colours_and_the_script() {
        let mut table = Table::new(["name", "state", "note"]);
        table.row(["漢字".to_owned(), "ready".green().to_string(), "a".to_owned()]);
        table.row(["decoder10".to_owned(), String::new(), "b".to_owned()]);
        assert_eq!(
            strip_str(&table.to_string()).to_string(),
            "NAME       STATE  NOTE\n漢字       ready  a\ndecoder10  -      b"
        );
    }
}
