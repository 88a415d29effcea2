//! Blocks of similar lines: the first of a kind is printed in full, the others as differences to it. PURE.

/// A title with lines below it. Blocks of one kind are compared.
#[derive(Debug, Clone)]
pub(super) struct TextBlock {
    pub(super) kind: String,
    pub(super) title: String,
    pub(super) lines: Vec<String>,
}

/// All blocks as text, with an empty line before each.
pub(super) fn text(blocks: &[TextBlock]) -> Vec<String> {
    let mut text = Vec::new();
    for (place, block) in blocks.iter().enumerate() {
        let first = blocks[..place].iter().find(|earlier| earlier.kind == block.kind);
        let (title, lines) = match first {
            None => (block.title.clone(), block.lines.clone()),
            Some(first) => but(first, block),
        };
        text.push(format!("\n{title}"));
        text.extend(lines.into_iter().map(|line| format!("  {line}")));
    }
    text
}

/// A block as differences to the first of its kind; in full if most lines differ.
fn but(first: &TextBlock, block: &TextBlock) -> (String, Vec<String>) {
    let (mut own, gone) = (missing(block, first), missing(first, block));
    if own.len() * 2 > block.lines.len() {
        return (block.title.clone(), block.lines.clone());
    }
    if own.is_empty() && gone.is_empty() {
        return (format!("{}: as {}", block.title, first.title), own);
    }
    // A changed line is printed with its new value, so only removed ones have to be named.
    let name = |line: &str| line.split([' ', '=', ':']).next().unwrap_or_default().to_owned();
    let without: Vec<String> = gone
        .into_iter()
        .filter(|line| !own.iter().any(|other| name(other) == name(line)))
        .map(|line| format!("without {line}"))
        .collect();
    own.extend(without);
    (format!("{}: as {}, but", block.title, first.title), own)
}

/// The lines of one block that another lacks, without the backslashes that join lines.
fn missing(of: &TextBlock, from: &TextBlock) -> Vec<String> {
    let plain = |line: &String| line.trim().trim_end_matches('\\').trim_end().to_owned();
    let known: Vec<String> = from.lines.iter().map(plain).collect();
    let lines = of.lines.iter().map(plain);
    lines.filter(|line| !known.contains(line)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(kind: &str, title: &str, lines: &[&str]) -> TextBlock {
        TextBlock {
            kind: kind.to_owned(),
            title: title.to_owned(),
            lines: lines.iter().map(|line| (*line).to_owned()).collect(),
        }
    }

    #[test]
    fn similar_blocks_show_only_differences() {
        let blocks = [
            block(
                "p",
                "prefiller1",
                &["A=1", "GPU=0", "vllm \\", "  --port 1 \\", "  --x"],
            ),
            block("p", "prefiller2", &["A=1", "GPU=1", "vllm \\", "  --port 2 \\"]),
            block("d", "decoder1", &["A=1", "GPU=0"]),
            block("d", "decoder2", &["A=1", "GPU=0"]),
            block("p", "prefiller3", &["other", "things", "altogether"]),
        ];
        assert_eq!(
            text(&blocks).join("\n"),
            "\nprefiller1\n  A=1\n  GPU=0\n  vllm \\\n    --port 1 \\\n    --x\n\
             \nprefiller2: as prefiller1, but\n  GPU=1\n  --port 2\n  without --x\n\
             \ndecoder1\n  A=1\n  GPU=0\n\ndecoder2: as decoder1\n\
             \nprefiller3\n  other\n  things\n  altogether"
        );
    }
}
