//! Environment variables hold secrets and test switches only: few, and each is documented.

use std::collections::BTreeMap;

use super::Finding;
use super::tree::Tree;

/// Most variables that the project may read.
const VARIABLES_MAX: usize = 10;
/// Where each is explained.
const DOCUMENT: &str = "docs/environment.md";
/// Also written in two pieces, lest this file be found.
const PREFIX: &str = concat!("POMONA", "_");

/// Checks the variables that code names.
pub fn check(tree: &Tree) -> Vec<Finding> {
    let explained = tree.text(DOCUMENT).unwrap_or_default();
    let mut findings = Vec::new();
    let variables = variables(tree);
    for (name, (path, line)) in &variables {
        if !explained.contains(&format!("`{name}`")) {
            let message = format!("{name} is not explained in {DOCUMENT}");
            findings.push(Finding::new(path, *line, "variable", message).about(name));
        }
    }
    if variables.len() > VARIABLES_MAX {
        let names: Vec<_> = variables.keys().cloned().collect();
        let message =
            format!("{} variables, {VARIABLES_MAX} are allowed: {}", names.len(), names.join(" "));
        findings.push(Finding::new(DOCUMENT, 0, "variables", message));
    }
    findings
}

/// Each variable and where it is first named.
fn variables(tree: &Tree) -> BTreeMap<String, (String, usize)> {
    let code = |path: &str| [".rs", ".py", ".js"].iter().any(|ending| path.ends_with(ending));
    let mut variables = BTreeMap::new();
    for (path, text) in tree.texts().filter(|(path, _)| code(path)) {
        for (index, line) in text.lines().enumerate() {
            for (at, _) in line.match_indices(PREFIX) {
                let rest = &line[at + PREFIX.len()..];
                let letter = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
                let end = rest.find(|c| !letter(c)).unwrap_or(rest.len());
                if end > 0 {
                    let name = format!("{PREFIX}{}", &rest[..end]);
                    variables.entry(name).or_insert_with(|| (path.to_owned(), index + 1));
                }
            }
        }
    }
    variables
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_few_and_explained() {
        let name = |n: usize| format!("{PREFIX}V{n}");
        let code: String = (0..11).map(|n| format!("var(\"{}\")\n", name(n))).collect();
        let document: String = (0..10).map(|n| format!("`{}`\n", name(n))).collect();
        let findings = check(&Tree::of(&[("a.rs", &code), (DOCUMENT, &document)]));
        let found: Vec<_> = findings.iter().map(|f| (f.rule, f.line)).collect();
        assert_eq!(found, [("variable", 11), ("variables", 0)]);
    }
}
