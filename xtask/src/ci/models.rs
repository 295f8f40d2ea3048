//! Stages that build the binary, fetch models with it, and run the tests that use them.

use anyhow::{Context, Result};

use super::workshop::{MODELS, Workshop, install, is_there, run};

/// The binary, as tests use it; or as a user builds it.
pub fn build(shop: &Workshop) -> Result<()> {
    match shop.release {
        // With all tests, so that what they share is built once.
        false => shop.cargo(&["test", "--workspace", "--locked", "--no-run"]),
        true => shop.cargo(&["build", "--release", "--locked", "-p", "pomona"]),
    }
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
    required.extend(machines(shop));
    run(command.env("POMONA_REQUIRE", required.join(",")))
}

/// What tests between machines need, installed where that is possible; the names of what is there.
fn machines(shop: &Workshop) -> Vec<&'static str> {
    let mut here = Vec::new();
    let may_join = is_there("ip", "-V") || installed(shop, "iproute2");
    let mut unshare = shop.command("unshare");
    unshare.args(["--net", "true"]);
    if may_join && unshare.status().is_ok_and(|status| status.success()) {
        here.push("namespaces");
    }
    if is_there("fi_info", "--version") || installed(shop, "libfabric-bin") {
        here.push("libfabric");
    }
    here
}

fn installed(shop: &Workshop, package: &str) -> bool {
    let done = install(shop, package);
    if let Err(error) = &done {
        println!("SKIPPED: tests that need {package}: {error}");
    }
    done.is_ok()
}
