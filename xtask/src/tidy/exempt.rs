//! What `xtask/tidy.toml` exempts from a rule, and the complaint about an exemption that nothing
//! needs any more.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::Finding;

/// Shorter reasons are none.
const REASON_BYTES_MIN: usize = 15;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    exempt: Vec<Exemption>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Exemption {
    rule: String,
    path: String,
    /// A function, crate or variable; without one, the whole file.
    item: Option<String>,
    reason: String,
    #[serde(skip)]
    used: bool,
}

/// All exemptions.
pub struct Exemptions(Vec<Exemption>);

impl Exemptions {
    /// Reads `tidy.toml`.
    pub fn parse(text: &str) -> Result<Exemptions> {
        let file: File = toml::from_str(text).context("cannot read xtask/tidy.toml")?;
        for entry in &file.exempt {
            ensure!(
                entry.reason.len() >= REASON_BYTES_MIN,
                "xtask/tidy.toml: the exemption of {} from {} needs a reason",
                entry.path,
                entry.rule
            );
        }
        Ok(Exemptions(file.exempt))
    }

    /// Whether a finding is exempt.
    pub fn cover(&mut self, finding: &Finding) -> bool {
        let mut covered = false;
        for entry in &mut self.0 {
            let item = entry.item.as_ref().is_none_or(|item| *item == finding.item);
            if entry.rule == finding.rule && entry.path == finding.path && item {
                entry.used = true;
                covered = true;
            }
        }
        covered
    }

    /// Exemptions that covered nothing.
    pub fn unused(&self) -> Vec<Finding> {
        let unused = self.0.iter().filter(|entry| !entry.used);
        let message = |entry: &Exemption| {
            let item = entry.item.as_deref().unwrap_or("the file");
            format!("{item} of {} needs no exemption from {}: remove it", entry.path, entry.rule)
        };
        unused.map(|e| Finding::new("xtask/tidy.toml", 0, "unused-exemption", message(e))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "[[exempt]]\nrule = \"file-lines\"\npath = \"a.rs\"\nitem = \"f\"\n\
                       reason = \"a table of generated numbers\"\n";

    #[test]
    fn an_exemption_covers_its_item_only() {
        let mut exemptions = Exemptions::parse(ONE).unwrap();
        let finding = |item: &str| Finding::new("a.rs", 1, "file-lines", "long").about(item);
        assert!(!exemptions.cover(&finding("g")));
        assert_eq!(exemptions.unused().len(), 1);
        assert!(exemptions.cover(&finding("f")));
        assert!(exemptions.unused().is_empty());
    }

    #[test]
    fn an_exemption_needs_a_reason() {
        assert!(Exemptions::parse(&ONE.replace("a table of generated numbers", "so")).is_err());
        assert!(Exemptions::parse(&ONE.replace("reason", "why")).is_err());
    }
}
