//! Pure crates do no I/O, read no clock or environment, start no thread, hold no global, and use
//! no unordered map. Their tests may.

use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{Attribute, ItemMod, ItemStatic, Path, UseTree};

use super::Finding;
use super::source::marks_test;
use super::tree::{Tree, crate_of, is_test_file};

const PURE_CRATES: &[&str] = &["types", "text", "scheduler", "policy", "simulator"];
/// Modules of `std` that act on the world.
const MODULES: &[&str] = &["env", "fs", "io", "net", "os", "process", "thread"];
/// Names that stand for a clock, a global, an order that changes, or randomness without a seed.
const NAMES: &[&str] = &[
    "HashMap",
    "HashSet",
    "Instant",
    "LazyLock",
    "Mutex",
    "OnceLock",
    "OsRng",
    "RandomState",
    "RwLock",
    "SystemTime",
    "thread_local",
    "thread_rng",
];

/// Checks the sources of the pure crates.
pub fn check(tree: &Tree) -> Vec<Finding> {
    let pure = |path: &str| crate_of(path).is_some_and(|own| PURE_CRATES.contains(&own));
    let files = tree.rust().filter(|(path, _)| pure(path) && !is_test_file(path));
    let mut findings = Vec::new();
    for (path, text) in files {
        // What does not parse is `source`'s to report.
        let Ok(file) = syn::parse_file(text) else { continue };
        let mut visitor = Visitor { path, findings: Vec::new() };
        visitor.visit_file(&file);
        findings.append(&mut visitor.findings);
    }
    findings
}

struct Visitor<'a> {
    path: &'a str,
    findings: Vec<Finding>,
}

impl Visitor<'_> {
    fn segments(&mut self, segments: &[String], line: usize) {
        let [first, rest @ ..] = segments else { return };
        let module = rest.first().filter(|name| MODULES.contains(&name.as_str()));
        let impure = match first.as_str() {
            "std" => module,
            _ => None,
        };
        let named = segments.iter().find(|name| NAMES.contains(&name.as_str()));
        if let Some(what) = impure.or(named) {
            let message = format!("a pure crate does without {}", segments.join("::"));
            self.findings.push(Finding::new(self.path, line, "purity", message).about(what));
        }
    }

    fn uses(&mut self, tree: &UseTree, before: &mut Vec<String>) {
        match tree {
            UseTree::Path(path) => {
                before.push(path.ident.to_string());
                self.uses(&path.tree, before);
                before.pop();
            }
            UseTree::Group(group) => group.items.iter().for_each(|item| self.uses(item, before)),
            UseTree::Glob(_) => self.segments(before, tree.span().start().line),
            UseTree::Name(_) | UseTree::Rename(_) => {
                let name = match tree {
                    UseTree::Rename(rename) => &rename.ident,
                    UseTree::Name(name) => &name.ident,
                    _ => return,
                };
                before.push(name.to_string());
                self.segments(before, tree.span().start().line);
                before.pop();
            }
        }
    }
}

fn is_test(attrs: &[Attribute]) -> bool {
    attrs.iter().any(marks_test)
}

impl<'ast> Visit<'ast> for Visitor<'_> {
    fn visit_item_mod(&mut self, item: &'ast ItemMod) {
        if !is_test(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        if !is_test(&item.attrs) {
            visit::visit_item_fn(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if !is_test(&item.attrs) {
            self.uses(&item.tree, &mut Vec::new());
        }
    }

    fn visit_item_static(&mut self, item: &'ast ItemStatic) {
        if matches!(item.mutability, syn::StaticMutability::Mut(_)) {
            let line = item.span().start().line;
            let message = "a pure crate holds no global that changes";
            self.findings.push(Finding::new(self.path, line, "purity", message));
        }
        visit::visit_item_static(self, item);
    }

    fn visit_path(&mut self, path: &'ast Path) {
        let segments: Vec<_> = path.segments.iter().map(|part| part.ident.to_string()).collect();
        self.segments(&segments, path.span().start().line);
        visit::visit_path(self, path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_one(text: &str, expected: &[&str]) {
        let findings = check(&Tree::of(&[("crates/scheduler/src/a.rs", text)]));
        let found: Vec<_> = findings.iter().map(|f| f.item.as_str()).collect();
        assert_eq!(found, expected, "{text}");
    }

    #[test]
    fn the_world_is_found_however_it_is_written() {
        check_one("use std::fs;", &["fs"]);
        check_one("use std::{fmt, time::{Duration, Instant}};", &["Instant"]);
        check_one("fn f() { std::thread::spawn(g); }", &["thread"]);
        check_one("use std::collections::{BTreeMap, HashMap as Map};", &["HashMap"]);
        check_one("use std::env::*;", &["env"]);
        check_one("static mut COUNT: u32 = 0;", &[""]);
        check_one("use std::time::Duration; use std::collections::BTreeMap;", &[]);
    }

    #[test]
    fn tests_may_do_as_they_like() {
        check_one("#[cfg(test)]\nmod tests { use std::fs; fn f() { std::env::args(); } }", &[]);
        let other = Tree::of(&[("crates/engine/src/a.rs", "use std::fs;")]);
        assert!(check(&other).is_empty());
    }
}
