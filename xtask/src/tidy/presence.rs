//! Documents that must be there, each crate's walkthrough, and the tests that promises name.

use std::collections::BTreeSet;

use super::Finding;
use super::tree::{Tree, crate_of};

const DOCUMENTS: &[&str] = &[
    ".ci/run",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "deny.toml",
    "docs/architecture.md",
    "docs/environment.md",
    "docs/glossary.md",
    "docs/promises.md",
    "docs/reproduce.md",
];

/// Checks that nothing is missing.
pub fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut need = |path: &str, why: &str| {
        if tree.files().all(|file| file != path) {
            findings.push(Finding::new(path, 0, "missing", why));
        }
    };
    for path in DOCUMENTS {
        need(path, "every checkout has it");
    }
    for name in tree.files().filter_map(crate_of).collect::<BTreeSet<_>>() {
        need(&format!("crates/{name}/tests/walkthrough.rs"), "each crate has a tour that runs");
    }
    let map = tree.text("docs/architecture.md").unwrap_or_default();
    for name in tree.files().filter_map(crate_of).collect::<BTreeSet<_>>() {
        if !map.contains(&format!("`{name}`")) {
            let message = format!("does not mention the crate `{name}`");
            findings.push(Finding::new("docs/architecture.md", 0, "map", message).about(name));
        }
    }
    findings.extend(promises(tree));
    findings
}

/// Tests that `docs/promises.md` names and nobody has written.
fn promises(tree: &Tree) -> Vec<Finding> {
    const PROMISES: &str = "docs/promises.md";
    let test = |name: &&str| {
        let letter = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        name.chars().all(letter) && name.matches('_').count() > 1
    };
    let is_written = |name: &str| {
        let heads = [format!("fn {name}("), format!("def {name}(")];
        tree.texts().any(|(_, text)| heads.iter().any(|head| text.contains(head.as_str())))
    };
    let mut findings = Vec::new();
    for (index, line) in tree.text(PROMISES).unwrap_or_default().lines().enumerate() {
        for name in line.split('`').skip(1).step_by(2).filter(test) {
            if !is_written(name) {
                let message = format!("there is no test {name}");
                findings.push(Finding::new(PROMISES, index + 1, "promise", message).about(name));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crate_needs_a_walkthrough_and_a_place_on_the_map() {
        let with = [
            ("crates/a/src/lib.rs", ""),
            ("crates/a/tests/walkthrough.rs", ""),
            ("docs/architecture.md", "`a` does this."),
        ];
        let rules = |tree: &Tree| -> Vec<_> {
            check(tree).into_iter().filter(|f| f.path.contains("/a") && f.rule != "x").collect()
        };
        assert!(rules(&Tree::of(&with)).is_empty());
        assert_eq!(rules(&Tree::of(&with[..1])).len(), 3);
    }

    #[test]
    fn a_promise_names_a_test_that_exists() {
        let tree = |promised: &str| {
            let promises = format!("| it works | `{promised}`, `field_name` |\n");
            let files = [("docs/promises.md", promises.as_str()), ("a.rs", "fn it_does_work() {}")];
            super::promises(&Tree::of(&files))
        };
        assert!(tree("it_does_work").is_empty());
        assert_eq!(tree("it_does_not_work").len(), 1);
    }
}
