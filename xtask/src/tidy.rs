//! The rules of the house that are checked: see `docs/architecture.md` for what they protect.
//!
//! Owns the list of rules and the printing of what breaks them. Each rule is a file beside this
//! one, works on [`Tree`] alone, and is tested on a tree made in memory. What is exempt stands in
//! `xtask/tidy.toml`, by name and with a reason.

mod commits;
mod exempt;
mod layers;
mod names;
mod presence;
mod purity;
mod source;
mod text;
mod tree;
mod variables;

use std::path::Path;

use anyhow::{Result, bail};

use self::exempt::Exemptions;
use self::tree::Tree;

/// Something that breaks a rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// Where: a path below the root.
    path: String,
    /// The line, from 1; 0 for the whole file.
    line: usize,
    /// The rule's name, as `tidy.toml` knows it.
    rule: &'static str,
    /// What is wrong, and what to do.
    message: String,
    /// What an exemption may name: a function, a crate, a variable.
    item: String,
}

impl Finding {
    fn new(path: &str, line: usize, rule: &'static str, message: impl Into<String>) -> Finding {
        let (path, message) = (path.to_owned(), message.into());
        Finding { path, line, rule, message, item: String::new() }
    }

    fn about(mut self, item: impl Into<String>) -> Finding {
        self.item = item.into();
        self
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}:{}: {}: {}", self.path, self.line, self.rule, self.message)
    }
}

/// Checks the tree under `root` and prints what is wrong.
pub fn run(root: &Path) -> Result<()> {
    let tree = Tree::read(root)?;
    let mut exemptions = Exemptions::parse(tree.text("xtask/tidy.toml").unwrap_or_default())?;
    let mut findings = check(&tree);
    findings.extend(commits::check(root)?);
    findings.retain(|finding| !exemptions.cover(finding));
    findings.extend(exemptions.unused());
    findings.sort();
    for finding in &findings {
        println!("{finding}");
    }
    match findings.len() {
        0 => {
            println!("tidy: {} files, nothing to say", tree.files().count());
            Ok(())
        }
        count => bail!("tidy: {count} findings"),
    }
}

/// Every rule that needs the tree only.
fn check(tree: &Tree) -> Vec<Finding> {
    let rules = [
        layers::check,
        names::check,
        presence::check,
        purity::check,
        source::check,
        text::check,
        variables::check,
    ];
    rules.iter().flat_map(|rule| rule(tree)).collect()
}
