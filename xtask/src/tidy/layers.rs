//! Arrows between crates point one way, and some libraries belong to some crates only.

use toml::{Table, Value};

use super::Finding;
use super::tree::{Tree, crate_of};

/// Layers from the bottom; a crate may depend on lower ones only.
const LAYERS: &[&[&str]] = &[
    &["types"],
    &["text", "scheduler", "policy", "device"],
    &["kernels", "fabric", "security", "simulator"],
    &["models"],
    &["engine", "cluster"],
    &["gateway"],
    &["pomona"],
];

/// Lower layers that a crate must not know all the same.
const STRANGERS: &[(&str, &[&str])] = &[
    ("kernels", &["text", "scheduler", "policy"]),
    ("models", &["scheduler", "policy"]),
    ("engine", &["policy"]),
    ("cluster", &["device", "kernels", "models"]),
    ("gateway", &["scheduler", "device", "kernels", "fabric", "models", "engine"]),
];

/// Libraries that only some crates may use.
const RESERVED: &[(&str, &[&str])] =
    &[("tokio", &["fabric", "cluster", "gateway", "pomona"]), ("anyhow", &["pomona", "xtask"])];

/// Everything that the pure crates may use besides each other.
const PURE: &[(&str, &[&str])] = &[
    ("types", &["serde", "thiserror"]),
    (
        "text",
        &[
            "minijinja",
            "minijinja-contrib",
            "self_cell",
            "serde",
            "serde_json",
            "thiserror",
            "tokenizers",
        ],
    ),
    ("scheduler", &["serde", "thiserror"]),
    ("policy", &["serde", "thiserror"]),
    ("simulator", &["serde", "serde_json", "thiserror"]),
];

/// Checks every manifest below `crates/`.
pub fn check(tree: &Tree) -> Vec<Finding> {
    let manifests = tree.texts().filter(|(path, _)| path.ends_with("/Cargo.toml"));
    manifests
        .filter_map(|(path, text)| Some(check_manifest(path, crate_of(path)?, text)))
        .flatten()
        .collect()
}

fn layer(name: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&name))
}

fn reserved<'a>(table: &'a [(&str, &'a [&str])], name: &str) -> Option<&'a [&'a str]> {
    table.iter().find(|(key, _)| *key == name).map(|(_, list)| *list)
}

fn check_manifest(path: &str, own: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |rule: &'static str, item: &str, message: String| {
        findings.push(Finding::new(path, 0, rule, message).about(item));
    };
    let Some(own_layer) = layer(own) else {
        find(
            "layers",
            own,
            format!("{own} is in no layer: give it one in xtask/src/tidy/layers.rs"),
        );
        return findings;
    };
    let Ok(manifest) = text.parse::<Table>() else {
        find("layers", own, "is not TOML".into());
        return findings;
    };
    if manifest.contains_key("features") {
        find("features", own, "has cargo features; what a machine has is found at run time".into());
    }
    for (section, name, value) in dependencies(&manifest) {
        if let Some(other) = name.strip_prefix("pomona-") {
            let up = layer(other).is_none_or(|layer| layer >= own_layer);
            let stranger = reserved(STRANGERS, own).is_some_and(|list| list.contains(&other));
            if up || stranger {
                find("layers", other, format!("{own} must not know {other} ({section})"));
            }
            continue;
        }
        if value.get("workspace").and_then(Value::as_bool) != Some(true) {
            let message = format!("{name}: write `{name}.workspace = true`; the root has versions");
            find("versions", name, message);
        }
        if section == "dev-dependencies" {
            continue;
        }
        if reserved(RESERVED, name).is_some_and(|users| !users.contains(&own)) {
            find("libraries", name, format!("{own} must not use {name}"));
        }
        if reserved(PURE, own).is_some_and(|list| !list.contains(&name)) {
            find("libraries", name, format!("{name} is not on the list of pure crates"));
        }
    }
    findings
}

/// Section, name and value of each dependency, those of targets too.
fn dependencies(manifest: &Table) -> Vec<(&str, &str, &Value)> {
    let targets = manifest.get("target").and_then(Value::as_table);
    let targets = targets.into_iter().flat_map(|all| all.values().filter_map(Value::as_table));
    let mut all = Vec::new();
    for table in std::iter::once(manifest).chain(targets) {
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let entries = table.get(section).and_then(Value::as_table).into_iter().flatten();
            all.extend(entries.map(|(name, value)| (section, name.as_str(), value)));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_one(own: &str, manifest: &str, expected: &[(&str, &str)]) {
        let path = format!("crates/{own}/Cargo.toml");
        let findings = check(&Tree::of(&[(&path, manifest)]));
        let found: Vec<_> = findings.iter().map(|f| (f.rule, f.item.as_str())).collect();
        assert_eq!(found, expected, "{own}: {manifest}");
    }

    #[test]
    fn arrows_point_down() {
        let on = |name: &str| format!("[dependencies]\npomona-{name}.workspace = true\n");
        check_one("models", &on("kernels"), &[]);
        check_one("kernels", &on("models"), &[("layers", "models")]);
        check_one("text", &on("scheduler"), &[("layers", "scheduler")]);
        check_one("gateway", &on("engine"), &[("layers", "engine")]);
        check_one("gateway", &on("text"), &[]);
        check_one("types", &on("unheard-of"), &[("layers", "unheard-of")]);
    }

    #[test]
    fn arrows_of_tests_and_targets_count() {
        let dev = "[dev-dependencies]\npomona-engine.workspace = true\n";
        check_one("gateway", dev, &[("layers", "engine")]);
        let target = "[target.'cfg(unix)'.dependencies]\ntokio.workspace = true\n";
        check_one("engine", target, &[("libraries", "tokio")]);
    }

    #[test]
    fn libraries_stay_where_they_belong() {
        let on = |name: &str| format!("[dependencies]\n{name}.workspace = true\n");
        check_one("engine", &on("anyhow"), &[("libraries", "anyhow")]);
        check_one("pomona", &on("anyhow"), &[]);
        check_one("scheduler", &on("rand"), &[("libraries", "rand")]);
    }

    #[test]
    fn versions_are_chosen_in_the_root() {
        check_one("device", "[dependencies]\nlibc = \"0.2\"\n", &[("versions", "libc")]);
        check_one("device", "[features]\ncuda = []\n", &[("features", "device")]);
        check_one("newcomer", "", &[("layers", "newcomer")]);
    }
}
