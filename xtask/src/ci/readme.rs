//! The README's commands: fenced blocks after `<!-- ci: KIND -->`.

/// What is done with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Started first, and left running.
    Serve,
    /// A shell script.
    Run,
    /// A Python program.
    Python,
}

/// A marked block.
#[derive(Debug, PartialEq, Eq)]
pub struct Block {
    /// What to do with it.
    pub kind: Kind,
    /// Its text.
    pub text: String,
    /// Line of its first line, from 1.
    pub line: usize,
}

/// The marked blocks of a Markdown text, in order. A mark without a block, or with a word that is
/// unknown, is an error.
pub fn blocks(markdown: &str) -> Result<Vec<Block>, String> {
    let mut blocks = Vec::new();
    let mut lines = markdown.lines().enumerate();
    while let Some((at, line)) = lines.next() {
        let mark = line.trim().strip_prefix("<!-- ci: ").and_then(|rest| rest.strip_suffix(" -->"));
        let kind = match mark {
            None => continue,
            Some("serve") => Kind::Serve,
            Some("run") => Kind::Run,
            Some("python") => Kind::Python,
            Some(other) => return Err(format!("line {}: unknown mark '{other}'", at + 1)),
        };
        let fence = lines.next().filter(|(_, line)| line.starts_with("```"));
        let Some((at, _)) = fence else {
            return Err(format!("line {}: no block follows the mark", at + 1));
        };
        let body = lines.by_ref().map(|(_, line)| line).take_while(|line| *line != "```");
        let text = body.map(|line| format!("{line}\n")).collect();
        blocks.push(Block { kind, text, line: at + 2 });
    }
    Ok(blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marked_blocks_are_found() {
        let text = "a\n<!-- ci: run -->\n```sh\ncurl x\n  y\n```\n\n```sh\nnot this\n```\n\
                    <!-- ci: python -->\n```python\nimport z\n```\n";
        let expected = [
            Block { kind: Kind::Run, text: "curl x\n  y\n".into(), line: 4 },
            Block { kind: Kind::Python, text: "import z\n".into(), line: 13 },
        ];
        assert_eq!(blocks(text).unwrap(), expected);
    }

    #[test]
    fn marks_that_mark_nothing_are_errors() {
        assert!(blocks("<!-- ci: run -->\ntext\n").is_err());
        assert!(blocks("<!-- ci: walk -->\n```sh\n```\n").is_err());
    }
}
