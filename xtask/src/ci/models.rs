//! Stages that build the binary, fetch models with it, and run the tests that use them.

use anyhow::{Context, Result};

use super::workshop::{MODELS, Workshop, run};

/// The release binary, as a user builds it.
pub fn build(shop: &Workshop) -> Result<()> {
    shop.cargo(&["build", "--release", "--locked", "-p", "pomona"])
}

/// Fetches the models with the binary itself.
pub fn pull(shop: &Workshop) -> Result<()> {
    let names = MODELS.iter().map(|(name, _)| name);
    run(shop.command(shop.pomona()).arg("pull").args(names))
}

/// All tests. Those that need a model skip aloud where it was not pulled.
pub fn test(shop: &Workshop) -> Result<()> {
    let cargo = std::env::var_os("CARGO").context("start this by `cargo xtask`")?;
    let mut command = shop.command(cargo);
    command.args(["test", "--workspace", "--locked", "--no-fail-fast"]);
    // Tests of the cache make homes of their own.
    command.env_remove("POMONA_HOME");
    let mut required = Vec::new();
    for (name, variable) in MODELS {
        match shop.model_at_hand(name) {
            Some(path) => {
                println!("{variable}={}", path.display());
                command.env(variable, path);
                required.push(*name);
            }
            None => println!("SKIPPED: tests that need {name}, which was not pulled"),
        }
    }
    run(command.env("POMONA_REQUIRE", required.join(",")))
}
