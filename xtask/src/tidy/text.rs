//! Rules about lines and files as text.

use super::Finding;
use super::tree::{Tree, is_test_file};

/// Longest source file.
const FILE_LINES_MAX: usize = 1000;
/// Longest line of Rust.
const LINE_COLUMNS_MAX: usize = 100;
/// Folders that exist on somebody's machine only. Written in pieces, lest this file be found.
const MACHINE_FOLDERS: &[&str] =
    &[concat!("/", "work/"), concat!("/", "home/"), concat!("/", "root/"), concat!("/", "tmp/")];
/// Words that ask for an issue's number: `TODO(#12)`.
const REMINDERS: &[&str] = &[concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];

/// Checks every text file.
pub fn check(tree: &Tree) -> Vec<Finding> {
    tree.texts().filter(|(path, _)| !is_foreign(path)).flat_map(|(p, t)| check_file(p, t)).collect()
}

/// Text that is not ours to shape.
fn is_foreign(path: &str) -> bool {
    ["LICENSE", "Cargo.lock", "fuzz/Cargo.lock"].contains(&path)
        || path.starts_with("fuzz/corpus/")
        || path.contains("/golden/")
        || path.contains("/data/")
}

fn check_file(path: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |line: usize, rule: &'static str, message: String| {
        findings.push(Finding::new(path, line, rule, message));
    };
    let is = |ending: &str| path.ends_with(ending);
    let count = text.lines().count();
    if (is(".rs") || is(".py") || is(".js") || is(".css")) && count > FILE_LINES_MAX {
        find(0, "file-lines", format!("has {count} lines, {FILE_LINES_MAX} are allowed"));
    }
    if !text.is_empty() && !text.ends_with('\n') {
        find(count, "line-end", "the last line has no end".into());
    }
    for (index, line) in text.lines().enumerate() {
        let columns = line.chars().count();
        if is(".rs") && columns > LINE_COLUMNS_MAX {
            find(
                index + 1,
                "columns",
                format!("{columns} columns, {LINE_COLUMNS_MAX} are allowed"),
            );
        }
        if line.ends_with(' ') && !is(".md") && !is_test_file(path) {
            find(index + 1, "line-end", "ends with a space".into());
        }
        if let Some(folder) = machine_folder(line).filter(|_| !is_test_file(path)) {
            let message = format!("{folder} is on one machine only: take a path from outside");
            find(index + 1, "machine-path", message);
        }
        for word in REMINDERS {
            if words(line, word).any(|after| !has_issue(after)) {
                find(index + 1, "reminder", format!("write {word}(#12), with the issue's number"));
            }
        }
    }
    findings
}

/// A machine's folder where a path begins.
fn machine_folder(line: &str) -> Option<&'static str> {
    MACHINE_FOLDERS.iter().copied().find(|folder| {
        line.match_indices(folder).any(|(at, _)| {
            let before = line[..at].chars().next_back();
            before.is_none_or(|c| !(c.is_alphanumeric() || "._-}/~)".contains(c)))
        })
    })
}

/// What follows `word` where it stands alone.
fn words<'a>(line: &'a str, word: &'a str) -> impl Iterator<Item = &'a str> {
    line.match_indices(word).filter_map(move |(at, _)| {
        let letter = |c: char| c.is_alphanumeric() || c == '_';
        let after = &line[at + word.len()..];
        let alone = !line[..at].ends_with(letter) && !after.starts_with(letter);
        alone.then_some(after)
    })
}

fn has_issue(after: &str) -> bool {
    let number = after.strip_prefix("(#").and_then(|rest| rest.split_once(')'));
    number.is_some_and(|(number, _)| number.parse::<u32>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_one(path: &str, text: &str, expected: &[&str]) {
        let findings = check(&Tree::of(&[(path, text)]));
        let found: Vec<_> = findings.iter().map(|f| f.rule).collect();
        assert_eq!(found, expected, "{text}");
    }

    #[test]
    fn files_and_lines_have_limits() {
        check_one("a.rs", &"x\n".repeat(1000), &[]);
        check_one("a.rs", &"x\n".repeat(1001), &["file-lines"]);
        check_one("a.rs", &format!("{}\n", "é".repeat(100)), &[]);
        check_one("a.rs", &format!("{}\n", "é".repeat(101)), &["columns"]);
        check_one("a.md", &format!("{}\n", "x".repeat(101)), &[]);
    }

    #[test]
    fn paths_of_a_machine_are_found() {
        for folder in MACHINE_FOLDERS {
            check_one("src/a.rs", &format!("open(\"{folder}x\")\n"), &["machine-path"]);
            check_one("src/a.rs", &format!("// {folder}x\n"), &["machine-path"]);
            check_one("src/a.rs", &format!("// docs{folder}x\n"), &[]);
            check_one("crates/a/tests/b.rs", &format!("open(\"{folder}x\")\n"), &[]);
        }
    }

    #[test]
    fn reminders_name_an_issue() {
        let word = REMINDERS[0];
        check_one("a.rs", &format!("// {word}: later\n"), &["reminder"]);
        check_one("a.rs", &format!("// {word}(#12): later\n"), &[]);
        check_one("a.rs", &format!("// {word}S\n"), &[]);
    }

    #[test]
    fn lines_end_where_they_seem_to() {
        check_one("a.rs", "x", &["line-end"]);
        check_one("a.rs", "x \n", &["line-end"]);
    }
}
