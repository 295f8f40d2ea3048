//! A tour of the command, in the order in which a person meets it. Each step runs.
#![allow(clippy::unwrap_used)] // A panic is how a test fails.

mod support;

use support::{pomona, test_model};

fn print(arguments: &[&str]) -> String {
    let home = tempfile::tempdir().unwrap();
    let output = pomona(home.path()).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_first_look() {
    // Without knowing anything: what can it do, and how is it said?
    let help = print(&["--help"]);
    for verb in ["serve", "chat", "run", "pull", "inspect", "bench", "tokenize", "perplexity"] {
        assert!(help.contains(&format!("\n  {verb} ")), "{verb}: {help}");
    }
    assert!(help.contains("pomona serve smollm2"));

    // Each verb explains its flags and their defaults.
    let serve = print(&["serve", "--help"]);
    assert!(serve.contains("[default: 8000]") && serve.contains("curl"), "{serve}");

    // Which models have a name of their own, and under which licence?
    let models = print(&["pull", "--list"]);
    assert!(models.contains("smollm2") && models.contains("Apache-2.0"), "{models}");
}

#[test]
fn a_model_on_disk() {
    let Some(model) = test_model("POMONA_TEST_SMOLLM2") else { return };
    let model = model.to_str().unwrap();

    // What is in the file, what will it need, what will it run on?
    let look = print(&["inspect", model]);
    for word in ["llama", "Q4_1", "context        8192", "weights", "kernels"] {
        assert!(look.contains(word), "{word}: {look}");
    }

    // The same for programs, every tensor included.
    let look: serde_json::Value =
        serde_json::from_str(&print(&["inspect", model, "--json"])).unwrap();
    assert_eq!(look["layers"], 30);
    assert!(look["tensors"].as_array().unwrap().len() > 200);

    // How does it cut text?
    assert!(print(&["tokenize", model, "Hello world"]).lines().count() == 2);

    // And what does it say?
    assert!(!print(&["run", model, "Hello", "--max-tokens", "4"]).trim().is_empty());
}
