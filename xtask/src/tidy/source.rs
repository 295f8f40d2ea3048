//! Rules about Rust's syntax: length of functions, where unsafe may stand and what it says, and
//! conditional compilation.

use proc_macro2::Span;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{
    Attribute, Block, ExprUnsafe, ImplItemFn, ItemFn, ItemImpl, Macro, Signature, TraitItemFn,
};

use super::Finding;
use super::tree::{Tree, crate_of, is_test_file};

/// Crates that may contain unsafe code.
const UNSAFE_CRATES: &[&str] = &["device", "kernels", "fabric"];
/// Longest function, from its signature to its closing brace.
const FUNCTION_LINES_MAX: usize = 80;
/// How far above an unsafe block its comment may begin.
const SAFETY_LINES_MAX: usize = 12;

/// Checks every Rust file.
pub fn check(tree: &Tree) -> Vec<Finding> {
    tree.rust().flat_map(|(path, text)| check_file(path, text)).collect()
}

fn check_file(path: &str, text: &str) -> Vec<Finding> {
    let file = match syn::parse_file(text) {
        Ok(file) => file,
        Err(error) => {
            let line = error.span().start().line;
            return vec![Finding::new(path, line, "syntax", error.to_string())];
        }
    };
    let mut visitor = Visitor {
        path,
        lines: text.lines().collect(),
        findings: Vec::new(),
        may_be_unsafe: crate_of(path).is_some_and(|own| UNSAFE_CRATES.contains(&own)),
        in_test: is_test_file(path),
        in_function: false,
        safety_is_told: tells_safety(&file.attrs),
    };
    let root = path.ends_with("src/lib.rs") || path.ends_with("src/main.rs");
    if root && !visitor.may_be_unsafe && !file.attrs.iter().any(forbids_unsafe) {
        visitor.find(1, "unsafe", "write #![forbid(unsafe_code)] at the top of the crate");
    }
    visitor.visit_file(&file);
    visitor.findings
}

struct Visitor<'a> {
    path: &'a str,
    lines: Vec<&'a str>,
    findings: Vec<Finding>,
    may_be_unsafe: bool,
    in_test: bool,
    in_function: bool,
    /// The module, or the trait, has a `# Safety` section for what is in it.
    safety_is_told: bool,
}

impl Visitor<'_> {
    fn find(&mut self, line: usize, rule: &'static str, message: &str) -> &mut Finding {
        self.findings.push(Finding::new(self.path, line, rule, message));
        self.findings.last_mut().expect("one was just put there")
    }

    /// A function with a body.
    fn function(&mut self, attrs: &[Attribute], signature: &Signature, block: &Block) {
        let name = signature.ident.to_string();
        let first = signature.span().start().line;
        let lines = block.span().end().line + 1 - first;
        if lines > FUNCTION_LINES_MAX {
            let message = format!("{name} has {lines} lines, {FUNCTION_LINES_MAX} are allowed");
            self.find(first, "function-lines", &message).item = name;
        }
        if signature.unsafety.is_some() {
            self.unsafe_at(first);
            if !self.safety_is_told && !tells_safety(attrs) {
                self.find(first, "safety", "an unsafe function has a `# Safety` section");
            }
        }
    }

    fn unsafe_at(&mut self, line: usize) {
        if !self.may_be_unsafe {
            self.find(line, "unsafe", "unsafe code belongs to device, kernels and fabric");
        }
    }

    /// An unsafe block or implementation: the comment stands above it.
    fn justified(&mut self, span: Span) {
        let line = span.start().line;
        self.unsafe_at(line);
        let above = line.saturating_sub(SAFETY_LINES_MAX + 1)..line.min(self.lines.len());
        let said = self.lines[above].iter().any(|line| line.contains("SAFETY:"));
        if !said {
            self.find(line, "safety", "`// SAFETY:` says which conditions hold, and why");
        }
    }

    /// Visits the inside of an item that has these attributes.
    fn inside(&mut self, attrs: &[Attribute], function: bool, visit: impl FnOnce(&mut Self)) {
        let before = (self.in_test, self.in_function);
        self.in_test |= attrs.iter().any(marks_test);
        self.in_function |= function;
        visit(self);
        (self.in_test, self.in_function) = before;
    }
}

impl<'ast> Visit<'ast> for Visitor<'_> {
    fn visit_item_fn(&mut self, item: &'ast ItemFn) {
        self.function(&item.attrs, &item.sig, &item.block);
        self.inside(&item.attrs, false, |this| {
            item.attrs.iter().for_each(|attr| this.visit_attribute(attr));
            this.inside(&[], true, |this| this.visit_block(&item.block));
        });
    }

    fn visit_impl_item_fn(&mut self, item: &'ast ImplItemFn) {
        self.function(&item.attrs, &item.sig, &item.block);
        self.inside(&item.attrs, true, |this| this.visit_block(&item.block));
    }

    fn visit_trait_item_fn(&mut self, item: &'ast TraitItemFn) {
        if let Some(block) = &item.default {
            self.function(&item.attrs, &item.sig, block);
            self.inside(&item.attrs, true, |this| this.visit_block(block));
        }
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        self.inside(&item.attrs, false, |this| visit::visit_item_mod(this, item));
    }

    fn visit_item_impl(&mut self, item: &'ast ItemImpl) {
        if item.unsafety.is_some() {
            self.justified(item.span());
        }
        let before = self.safety_is_told;
        self.safety_is_told |= item.trait_.is_some();
        self.inside(&item.attrs, false, |this| visit::visit_item_impl(this, item));
        self.safety_is_told = before;
    }

    fn visit_expr_unsafe(&mut self, expr: &'ast ExprUnsafe) {
        self.justified(expr.span());
        visit::visit_expr_unsafe(self, expr);
    }

    fn visit_attribute(&mut self, attr: &'ast Attribute) {
        if self.in_function && !self.in_test && attr.path().is_ident("cfg") && !marks_test(attr) {
            let message = "cfg goes on whole files and items, not inside a function";
            self.find(attr.span().start().line, "cfg", message);
        }
    }

    fn visit_macro(&mut self, call: &'ast Macro) {
        if self.in_function && !self.in_test && call.path.is_ident("cfg") {
            let message = "cfg! goes nowhere: a whole file or item has #[cfg]";
            self.find(call.span().start().line, "cfg", message);
        }
        visit::visit_macro(self, call);
    }
}

/// `#[test]` or `#[cfg(test)]`.
pub fn marks_test(attr: &Attribute) -> bool {
    if attr.path().is_ident("test") {
        return true;
    }
    let list = attr.meta.require_list().ok().filter(|list| list.path.is_ident("cfg"));
    list.is_some_and(|list| {
        let words = list.tokens.to_string();
        words == "test" || (words.starts_with("all") && words.contains("test"))
    })
}

fn forbids_unsafe(attr: &Attribute) -> bool {
    let list = attr.meta.require_list().ok().filter(|list| list.path.is_ident("forbid"));
    list.is_some_and(|list| list.tokens.to_string().contains("unsafe_code"))
}

fn tells_safety(attrs: &[Attribute]) -> bool {
    attrs.iter().any(|attr| doc(attr).is_some_and(|text| text.contains("# Safety")))
}

fn doc(attr: &Attribute) -> Option<String> {
    let pair = attr.meta.require_name_value().ok().filter(|pair| pair.path.is_ident("doc"))?;
    match &pair.value {
        syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(text), .. }) => Some(text.value()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_one(path: &str, text: &str, expected: &[(usize, &str)]) {
        let findings = check(&Tree::of(&[(path, text)]));
        let found: Vec<_> = findings.iter().map(|f| (f.line, f.rule)).collect();
        assert_eq!(found, expected, "{text}");
    }

    #[test]
    fn functions_have_an_end_in_sight() {
        let body = |lines: usize| format!("fn f() {{\n{}}}\n", "    g();\n".repeat(lines));
        check_one("a.rs", &body(78), &[]);
        check_one("a.rs", &body(79), &[(1, "function-lines")]);
        let method = format!("impl A {{\n{}}}\n", body(79));
        check_one("a.rs", &method, &[(2, "function-lines")]);
    }

    #[test]
    fn unsafe_has_its_crates() {
        let text = "fn f() {\n    // SAFETY: it is.\n    unsafe { g() }\n}\n";
        check_one("crates/kernels/src/a.rs", text, &[]);
        check_one("crates/engine/src/a.rs", text, &[(3, "unsafe")]);
        check_one("crates/engine/src/lib.rs", "mod a;\n", &[(1, "unsafe")]);
        check_one("crates/engine/src/lib.rs", "#![forbid(unsafe_code)]\nmod a;\n", &[]);
    }

    #[test]
    fn unsafe_says_why_it_is_safe() {
        let block = "fn f() {\n    unsafe { g() }\n}\n";
        check_one("crates/device/src/a.rs", block, &[(2, "safety")]);
        check_one("crates/device/src/a.rs", "unsafe impl Send for A {}\n", &[(1, "safety")]);
        let function = "/// Reads.\npub unsafe fn f() {}\n";
        check_one("crates/device/src/a.rs", function, &[(2, "safety")]);
        let method = "impl A for B {\n    unsafe fn f() {}\n}\n";
        check_one("crates/device/src/a.rs", method, &[]);
        check_one("crates/device/src/a.rs", &format!("//! # Safety\n{function}"), &[]);
        let told = "/// Reads.\n///\n/// # Safety\n/// `p` is valid.\npub unsafe fn f() {}\n";
        check_one("crates/device/src/a.rs", told, &[]);
    }

    #[test]
    fn cfg_stays_out_of_functions() {
        check_one("a.rs", "#[cfg(target_arch = \"x86_64\")]\nfn f() {}\n", &[]);
        check_one("a.rs", "fn f() {\n    #[cfg(unix)]\n    g();\n}\n", &[(2, "cfg")]);
        check_one("a.rs", "fn f() {\n    if cfg!(unix) {}\n}\n", &[(2, "cfg")]);
        let test = "#[cfg(test)]\nmod tests {\n    fn f() {\n        if cfg!(unix) {}\n    }\n}\n";
        check_one("a.rs", test, &[]);
    }

    #[test]
    fn what_is_no_rust_is_found() {
        check_one("a.rs", "fn f( {\n", &[(1, "syntax")]);
    }
}
