//! Licences and sources of everything that is compiled in. `cargo deny` checks more; this needs no
//! tool, so it always runs.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::workshop::Workshop;

/// Licences that ask for no more than a notice.
const PERMISSIVE: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Checks all packages that the lock file names.
pub fn check(shop: &Workshop) -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = shop.command(cargo);
    command.args(["metadata", "--format-version", "1", "--locked"]);
    let output = command.output().context("cannot run cargo metadata")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().context("cargo metadata has no packages")?;
    let bad: Vec<String> = packages.iter().filter_map(complaint).collect();
    if !bad.is_empty() {
        bail!("{}", bad.join("\n"));
    }
    println!("{} packages, all permissive, all from the registry or from here", packages.len());
    Ok(())
}

fn complaint(package: &Value) -> Option<String> {
    let name = package["name"].as_str().unwrap_or("?");
    let source = package["source"].as_str();
    if source
        .is_some_and(|source| !source.starts_with("registry+") && !source.starts_with("sparse+"))
    {
        return Some(format!("{name}: comes from {}", source.unwrap_or_default()));
    }
    let licence = package["license"].as_str().unwrap_or_default();
    (!is_permissive(licence)).then(|| format!("{name}: licence '{licence}' is not on the list"))
}

/// Whether an SPDX expression can be met by permissive licences (SPDX specification, annex
/// "SPDX license expressions": AND binds closer than OR). `/` is an old way to write OR.
fn is_permissive(expression: &str) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = words.as_slice();
    let met = either(&mut rest);
    met && rest.is_empty()
}

fn either(words: &mut &[&str]) -> bool {
    let mut met = both(words);
    while let ["OR", rest @ ..] = words {
        *words = rest;
        met |= both(words);
    }
    met
}

fn both(words: &mut &[&str]) -> bool {
    let mut met = single(words);
    while let ["AND", rest @ ..] = words {
        *words = rest;
        met &= single(words);
    }
    met
}

fn single(words: &mut &[&str]) -> bool {
    match *words {
        ["(", rest @ ..] => {
            *words = rest;
            let met = either(words);
            let [")", rest @ ..] = *words else { return false };
            *words = rest;
            met
        }
        [name, "WITH", exception, rest @ ..] => {
            *words = rest;
            PERMISSIVE.contains(&format!("{name} WITH {exception}").as_str())
        }
        [name, rest @ ..] => {
            *words = rest;
            PERMISSIVE.contains(name)
        }
        [] => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_read_as_spdx_says() {
        for (expression, met) in [
            ("MIT", true),
            ("MIT/Apache-2.0", true),
            ("GPL-3.0 OR MIT", true),
            ("GPL-3.0 AND MIT", false),
            ("(MIT OR GPL-3.0) AND Unicode-3.0", true),
            ("MIT AND (GPL-3.0 OR AGPL-3.0)", false),
            ("Apache-2.0 WITH LLVM-exception OR GPL-2.0", true),
            ("", false),
            ("(MIT", false),
        ] {
            assert_eq!(is_permissive(expression), met, "{expression}");
        }
    }

    #[test]
    fn sources_other_than_the_registry_are_named() {
        let package = serde_json::json!({ "name": "a", "source": "git+x", "license": "MIT" });
        assert!(complaint(&package).is_some_and(|text| text.contains("git+x")));
        let own = serde_json::json!({ "name": "a", "source": null, "license": "Apache-2.0" });
        assert_eq!(complaint(&own), None);
    }
}
