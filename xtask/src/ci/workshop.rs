//! Where the stages work: folders below `target`, and how programs are started there.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// Models that tests use, and the variable that tells tests where each is.
pub const MODELS: &[(&str, &str)] =
    &[("smollm2", "POMONA_TEST_SMOLLM2"), ("gemma3-270m", "POMONA_TEST_GEMMA")];

/// Folders and programs.
pub struct Workshop {
    /// The repository.
    pub root: PathBuf,
    /// Build outputs.
    pub target: PathBuf,
    /// The model cache that tests use.
    pub home: PathBuf,
    /// Whether ends are tested with the release binary, which takes minutes more to build.
    pub release: bool,
}

impl Workshop {
    /// The workshop of the repository at `root`. Creates nothing.
    pub fn new(root: &Path, release: bool) -> Workshop {
        let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
        let target = root.join(target.unwrap_or_else(|| "target".into()));
        let home = std::env::var_os("POMONA_HOME").map(PathBuf::from);
        let home = root.join(home.unwrap_or_else(|| target.join("ci-home")));
        Workshop { root: root.to_path_buf(), target, home, release }
    }

    /// The binary.
    pub fn pomona(&self) -> PathBuf {
        self.target.join(if self.release { "release/pomona" } else { "debug/pomona" })
    }

    /// A program that starts in the root, with the tests' model cache.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.root).env("POMONA_HOME", &self.home).stdin(Stdio::null());
        command
    }

    /// Runs `cargo` with `words`.
    pub fn cargo(&self, words: &[&str]) -> Result<()> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        run(self.command(cargo).args(words))
    }

    /// The file of a model that was pulled, or `None` where the binary was not built either.
    pub fn model_at_hand(&self, name: &str) -> Option<PathBuf> {
        if !self.home.is_dir() {
            return None;
        }
        let output = self.command(self.pomona()).args(["pull", name]).output().ok()?;
        let path = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
        (output.status.success() && path.is_file()).then_some(path)
    }

    /// Python with the packages that end-to-end tests use, below `target`.
    pub fn python(&self) -> Result<PathBuf> {
        let venv = self.target.join("ci-venv");
        let python = venv.join("bin/python");
        if !python.exists() {
            run(self.command("python3").args(["-m", "venv"]).arg(&venv)).context(
                "cannot make a Python environment (Debian: apt-get install python3-venv)",
            )?;
        }
        let packages = self.root.join("tests/e2e/requirements.txt");
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"];
        run(self.command(&python).args(pip).arg(packages))?;
        Ok(python)
    }
}

/// Runs a program to its end, its output shown; fails unless it succeeds.
pub fn run(command: &mut Command) -> Result<()> {
    let line = shown(command);
    println!("$ {line}");
    let status = command.status().with_context(|| format!("cannot start `{line}`"))?;
    ensure!(status.success(), "`{line}` fails: {status}");
    Ok(())
}

/// Whether a program can be started.
pub fn is_there(program: &str, word: &str) -> bool {
    let mut command = Command::new(program);
    command.arg(word).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Installs a Debian package, where that is possible.
pub fn install(shop: &Workshop, package: &str) -> Result<()> {
    let user = Command::new("id").arg("-u").output().context("cannot run id")?;
    if user.stdout.trim_ascii() != b"0" || !is_there("apt-get", "--version") {
        bail!("{package} is missing: install it (Debian: apt-get install {package})");
    }
    let apt = |words: &[&str]| {
        run(shop.command("apt-get").env("DEBIAN_FRONTEND", "noninteractive").args(words))
    };
    apt(&["update", "-qq"])?;
    apt(&["install", "-y", "-qq", "--no-install-recommends", package])
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}
