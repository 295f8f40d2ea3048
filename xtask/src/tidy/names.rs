//! Files are named after the noun they define.

use super::Finding;
use super::tree::Tree;

const NAMELESS: &[&str] = &["utils", "util", "helpers", "helper", "common", "misc"];

/// Checks the names of source files and folders.
pub fn check(tree: &Tree) -> Vec<Finding> {
    let code = tree
        .files()
        .filter(|path| [".rs", ".py", ".js"].iter().any(|ending| path.ends_with(ending)));
    let mut findings = Vec::new();
    for path in code {
        for part in path.split('/') {
            let stem = part.split('.').next().unwrap_or(part);
            if NAMELESS.contains(&stem) {
                let message = format!("'{stem}' names nothing: name it after what it defines");
                findings.push(Finding::new(path, 0, "file-name", message));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_say_nothing_are_found() {
        let tree = Tree::of(&[
            ("crates/a/src/utils.rs", ""),
            ("crates/a/tests/common/mod.rs", ""),
            ("crates/a/src/utility_curve.rs", ""),
        ]);
        let found: Vec<_> = check(&tree).into_iter().map(|f| f.path).collect();
        assert_eq!(found, ["crates/a/src/utils.rs", "crates/a/tests/common/mod.rs"]);
    }
}
