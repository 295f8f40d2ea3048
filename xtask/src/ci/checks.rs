//! Stages that look at the source only.

use anyhow::Result;

use super::workshop::{Workshop, is_there, run};

/// rustfmt has nothing to change.
pub fn format(shop: &Workshop) -> Result<()> {
    shop.cargo(&["fmt", "--all", "--check"])
}

/// Our own rules.
pub fn tidy(shop: &Workshop) -> Result<()> {
    crate::tidy::run(&shop.root)
}

/// Clippy over every target of the workspace.
pub fn clippy(shop: &Workshop) -> Result<()> {
    shop.cargo(&["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"])
}

/// Bans, licences and sources. Advisories need a clone of their database and are left to whoever
/// runs `cargo deny check` by hand.
pub fn deny(shop: &Workshop) -> Result<()> {
    if !is_there("cargo-deny", "--version") {
        println!("SKIPPED: cargo-deny is not installed (cargo install cargo-deny --locked)");
        return Ok(());
    }
    run(shop.command("cargo-deny").args(["check", "bans", "licenses", "sources"]))
}
