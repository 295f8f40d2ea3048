//! Stages from end to end: the binary, a real model, a real client.

use std::process::Command;

use anyhow::{Context, Result, anyhow, ensure};

use super::readme::{Kind, blocks};
use super::server::Server;
use super::workshop::{Workshop, install, is_there, run};

/// What end-to-end tests talk to.
const MODEL: &str = "smollm2";
/// Names under which systems have Chromium.
const BROWSERS: &[&str] = &["chromium", "chromium-browser", "google-chrome", "chrome"];

/// `pomona serve` on a free port.
fn serve(shop: &Workshop, stage: &str) -> Result<Server> {
    let mut command = shop.command(shop.pomona());
    command.args(["serve", MODEL, "--port", "0"]);
    Server::start(command, shop.target.join(format!("ci-{stage}.log")))
}

/// The `openai` package, unmodified.
pub fn openai(shop: &Workshop) -> Result<()> {
    let python = shop.python()?;
    serve(shop, "openai")?.during(|url| {
        let mut tests = shop.command(&python);
        run(tests.args(["tests/e2e/test_openai.py", "-v"]).env("POMONA_URL", url))
    })
}

/// The chat page in a real browser, and its picture.
pub fn page(shop: &Workshop) -> Result<()> {
    let named = std::env::var_os("CHROMIUM").is_some();
    if !named && !BROWSERS.iter().any(|browser| is_there(browser, "--version")) {
        let installed = install(shop, "chromium");
        if let Err(error) = &installed
            && std::env::var_os("CI").is_none()
        {
            println!("SKIPPED: the chat page needs a browser: {error}");
            return Ok(());
        }
        installed?;
    }
    serve(shop, "page")?.during(|url| {
        let mut test = shop.command("python3");
        test.arg("tests/e2e/chat_page.py").arg(shop.target.join("chat.png"));
        run(test.env("POMONA_URL", url))
    })
}

/// Everything that the README tells a reader to type, as it is printed there, but that the server
/// is the binary which is there.
pub fn readme(shop: &Workshop) -> Result<()> {
    let python = shop.python()?;
    let text = std::fs::read_to_string(shop.root.join("README.md"))?;
    let blocks = blocks(&text).map_err(|message| anyhow!("README.md: {message}"))?;
    let (first, rest) = blocks.split_first().context("README.md has no marked commands")?;
    ensure!(first.kind == Kind::Serve, "README.md: the first marked command starts the server");
    let mut command = shop.command("bash");
    // `exec` lets the signal that ends it reach it.
    let words = first.text.trim().strip_prefix("cargo run --release -- ");
    let words = words.context("README.md: the server is started by cargo run --release")?;
    command.args(["-euc", &format!("exec {} {words}", shop.pomona().display())]);
    let server = Server::start(command, shop.target.join("ci-readme.log"))?;
    server.during(|_| {
        for block in rest {
            println!("\nREADME.md:{}\n{}", block.line, block.text.trim_end());
            let mut command: Command = match block.kind {
                Kind::Python => shop.command(&python),
                Kind::Run | Kind::Serve => shop.command("bash"),
            };
            match block.kind {
                Kind::Python => command.args(["-c", &block.text]),
                Kind::Run | Kind::Serve => command.args(["-euo", "pipefail", "-c", &block.text]),
            };
            let status = command.status().context("cannot start it")?;
            ensure!(status.success(), "README.md:{}: fails: {status}", block.line);
        }
        Ok(())
    })
}
