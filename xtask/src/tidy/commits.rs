//! Titles of commits: `area: what it does`, short.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::Finding;

/// Widest title.
const TITLE_COLUMNS_MAX: usize = 72;
/// How far back titles are read; a shallow clone has fewer.
const COMMITS_MAX: usize = 200;

/// Checks the latest commits. Without git's history there is nothing to check, and it says so.
pub fn check(root: &Path) -> Result<Vec<Finding>> {
    let mut git = Command::new("git");
    git.args([
        "log",
        "--no-merges",
        "--abbrev=12",
        "--format=%h %s",
        &format!("--max-count={COMMITS_MAX}"),
    ]);
    let output = git.current_dir(root).output()?;
    if !output.status.success() {
        println!("tidy: commit titles are skipped: git has no history here");
        return Ok(Vec::new());
    }
    let log = String::from_utf8_lossy(&output.stdout);
    Ok(log.lines().filter_map(|line| line.split_once(' ')).filter_map(check_title).collect())
}

fn check_title((hash, title): (&str, &str)) -> Option<Finding> {
    let columns = title.chars().count();
    let area = title.split_once(": ").map(|(area, _)| area);
    let message = match area {
        _ if columns > TITLE_COLUMNS_MAX => {
            format!("its title has {columns} columns, {TITLE_COLUMNS_MAX} are allowed")
        }
        Some(area) if !area.is_empty() && !area.contains(' ') => return None,
        _ => "its title does not say `area: what it does`".to_owned(),
    };
    Some(Finding::new(&format!("commit {hash}"), 0, "commit-title", message).about(hash))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn titles_are_short_and_name_their_area() {
        for (title, fine) in [
            ("scheduler: keep prefix blocks on preempt", true),
            ("types,text: agree on tokens", true),
            ("fix things", false),
            ("some more words: fix things", false),
        ] {
            assert_eq!(check_title(("abc", title)).is_none(), fine, "{title}");
        }
        let long = format!("text: {}", "x".repeat(67));
        assert!(check_title(("abc", &long)).is_some());
        assert!(check_title(("abc", &long[..72])).is_none());
    }
}
