//! The files that the rules look at: what git tracks or would track, read once.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Larger files are data.
const TEXT_BYTES_MAX: usize = 1 << 20;

/// Files by path below the root. Binary files have no text.
pub struct Tree {
    files: BTreeMap<String, Option<String>>,
}

impl Tree {
    /// Reads what git knows below `root`, and files that are new and not ignored.
    pub fn read(root: &Path) -> Result<Tree> {
        let mut git = Command::new("git");
        git.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
        let output = git.current_dir(root).output().context("cannot run git to list the files")?;
        ensure!(output.status.success(), "`git ls-files` fails: is this a git checkout?");
        let names = String::from_utf8(output.stdout).context("a file's name is not UTF-8")?;
        let mut files = BTreeMap::new();
        for name in names.split_terminator('\0') {
            // A file that was deleted and not committed yet is no longer there.
            let Ok(bytes) = std::fs::read(root.join(name)) else { continue };
            let text = String::from_utf8(bytes).ok();
            let text = text.filter(|text| text.len() <= TEXT_BYTES_MAX && !text.contains('\0'));
            files.insert(name.to_owned(), text);
        }
        Ok(Tree { files })
    }

    /// A tree of the files given.
    #[cfg(test)]
    pub fn of(files: &[(&str, &str)]) -> Tree {
        let files = files.iter().map(|(path, text)| ((*path).into(), Some((*text).into())));
        Tree { files: files.collect() }
    }

    /// Paths of all files.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// Text files: path and content.
    pub fn texts(&self) -> impl Iterator<Item = (&str, &str)> {
        self.files.iter().filter_map(|(path, text)| Some((path.as_str(), text.as_deref()?)))
    }

    /// One text file.
    pub fn text(&self, path: &str) -> Option<&str> {
        self.files.get(path)?.as_deref()
    }

    /// Rust files: path and content.
    pub fn rust(&self) -> impl Iterator<Item = (&str, &str)> {
        self.texts().filter(|(path, _)| path.ends_with(".rs"))
    }
}

/// The crate that a path below `crates/` belongs to.
pub fn crate_of(path: &str) -> Option<&str> {
    path.strip_prefix("crates/")?.split_once('/').map(|(name, _)| name)
}

/// Whether a file holds tests, benches or examples only.
pub fn is_test_file(path: &str) -> bool {
    let folder =
        |name: &str| path.starts_with(&format!("{name}/")) || path.contains(&format!("/{name}/"));
    let file = path.rsplit('/').next().unwrap_or(path);
    folder("tests")
        || folder("benches")
        || folder("examples")
        || folder("golden")
        || ["tests.rs", "props.rs", "cases.rs"].contains(&file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_tells_its_crate() {
        assert_eq!(crate_of("crates/text/src/lib.rs"), Some("text"));
        assert_eq!(crate_of("xtask/src/main.rs"), None);
        assert_eq!(crate_of("crates/README.md"), None);
    }

    #[test]
    fn a_path_tells_whether_it_is_a_test() {
        for path in ["crates/a/tests/b.rs", "crates/a/src/b/tests.rs", "tests/e2e/x.py"] {
            assert!(is_test_file(path), "{path}");
        }
        for path in ["crates/a/src/tests_of_faith.rs", "crates/contests/src/lib.rs"] {
            assert!(!is_test_file(path), "{path}");
        }
    }
}
