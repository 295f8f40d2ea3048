//! `pomona chat`: a conversation in the terminal.

use std::io::{IsTerminal, Write, stdout};

use anyhow::Result;
use clap::Args;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use serde_json::{Value, json};

use super::args::{EngineArgs, ModelName};
use super::conversation::{Conversation, SamplingArgs};
use crate::http::Client;
use crate::local::LocalServer;
use crate::models::progress::say;

const HELP: &str = "\
/help            this list
/system TEXT     sets the system prompt and starts over (without TEXT: removes it)
/set NAME VALUE  temperature, top_p, top_k, min_p or max_tokens
/retry           asks for another answer to the last message
/reset           forgets the conversation
/exit            leaves (so does Ctrl-D)
Ctrl-C stops an answer. End a line with \\ to go on in the next one.";

/// Flags of `chat`.
#[derive(Args, Debug)]
pub struct ChatArgs {
    #[command(flatten)]
    model: ModelNameOrUrl,
    /// The system prompt
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

/// A model to load here, or a server that has one.
#[derive(Args, Clone, Debug)]
struct ModelNameOrUrl {
    #[command(flatten)]
    model: ModelName,
    /// Talk to the server at this address instead of loading a model
    #[arg(long, value_name = "URL", conflicts_with = "ModelName")]
    url: Option<String>,
    /// The model's name at that server [default: its first]
    #[arg(long, value_name = "NAME", requires = "url")]
    served_model_name: Option<String>,
    /// Key for that server
    #[arg(
        long,
        value_name = "KEY",
        requires = "url",
        env = "POMONA_API_KEY",
        hide_env_values = true
    )]
    api_key: Option<String>,
}

/// Runs the verb.
pub fn run(args: &ChatArgs) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let (client, name, local) = match (&args.model.url, args.model.model.get()) {
        (Some(url), _) => {
            let client = Client::new(url, args.model.api_key.as_deref())?;
            let name = match &args.model.served_model_name {
                Some(name) => name.clone(),
                None => runtime.block_on(client.first_model())?,
            };
            (client, name, None)
        }
        (None, Some(model)) => {
            let server = LocalServer::start(model, &args.engine, &runtime)?;
            if !server.has_chat_template() {
                say("this is a base model without a chat template: `pomona run` continues text");
            }
            (server.client()?, server.name().to_owned(), Some(server))
        }
        (None, None) => anyhow::bail!("name a model, such as `pomona chat smollm2`, or give --url"),
    };
    let conversation =
        Conversation { client, model: name, sampling: args.sampling.clone(), seed: None };
    let result = Session::new(conversation, args.system.clone()).run(&runtime);
    if let Some(server) = local {
        server.stop(&runtime);
    }
    result
}

/// A conversation and what has been said.
struct Session {
    conversation: Conversation,
    system: Option<String>,
    messages: Vec<Value>,
}

/// What a line of input asks for.
enum Step {
    Answer,
    Nothing,
    Leave,
}

impl Session {
    fn new(conversation: Conversation, system: Option<String>) -> Session {
        Session { conversation, system, messages: Vec::new() }
    }

    fn run(&mut self, runtime: &tokio::runtime::Runtime) -> Result<()> {
        let mut editor = DefaultEditor::new()?;
        say(&format!("talking to {}; /help lists commands", self.conversation.model));
        while let Some(line) = read(&mut editor)? {
            match self.step(&line) {
                Step::Leave => break,
                Step::Nothing => {}
                Step::Answer => self.answer(runtime)?,
            }
        }
        Ok(())
    }

    /// Takes a line: a command or a message.
    fn step(&mut self, line: &str) -> Step {
        let line = line.trim();
        let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        match command {
            "" => return Step::Nothing,
            "/exit" | "/quit" | "/bye" => return Step::Leave,
            "/help" | "/?" => say(HELP),
            "/reset" | "/clear" => self.reset(),
            "/system" => {
                self.system = Some(rest.to_owned()).filter(|text| !text.is_empty());
                self.reset();
            }
            "/set" => {
                let (name, value) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
                if let Err(why) = self.conversation.sampling.set(name, value.trim()) {
                    say(&why);
                }
            }
            "/retry" => {
                if self.messages.last().is_some_and(|m| m["role"] == "assistant") {
                    self.messages.pop();
                }
                if self.messages.is_empty() {
                    say("nothing has been said yet");
                    return Step::Nothing;
                }
                return Step::Answer;
            }
            _ if command.starts_with('/') && !command[1..].contains('/') => {
                say(&format!("there is no command {command}; /help lists them"));
            }
            _ => {
                self.messages.push(json!({"role": "user", "content": line}));
                return Step::Answer;
            }
        }
        Step::Nothing
    }

    fn reset(&mut self) {
        self.messages.clear();
        say("a new conversation");
    }

    fn answer(&mut self, runtime: &tokio::runtime::Runtime) -> Result<()> {
        let system = self.system.iter().map(|text| json!({"role": "system", "content": text}));
        let messages: Vec<Value> = system.chain(self.messages.iter().cloned()).collect();
        match runtime.block_on(self.conversation.chat(&messages)) {
            Ok(answer) => {
                writeln!(stdout())?;
                let (dim, plain) =
                    if stdout().is_terminal() { ("\x1b[2m", "\x1b[0m") } else { ("", "") };
                say(&format!("{dim}{}{plain}", answer.summary()));
                self.messages.push(json!({"role": "assistant", "content": answer.text}));
            }
            Err(error) => {
                // The message that could not be answered is taken back, so the next one can be.
                self.messages.pop();
                // What went wrong is said even if nobody reads the answers any more.
                let _ = writeln!(stdout());
                say(&format!("{error:#}"));
                if error.downcast_ref::<crate::http::Refused>().is_none() {
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

/// A line, or several joined by `\`; `None` at the end of input.
fn read(editor: &mut DefaultEditor) -> Result<Option<String>> {
    let mut text = String::new();
    loop {
        let prompt = if text.is_empty() { "> " } else { ". " };
        match editor.readline(prompt) {
            Ok(line) => {
                if let Some(start) = line.strip_suffix('\\') {
                    text.push_str(start);
                    text.push('\n');
                    continue;
                }
                text.push_str(&line);
                if !text.trim().is_empty() {
                    editor.add_history_entry(&text)?;
                }
                return Ok(Some(text));
            }
            Err(ReadlineError::Interrupted) => {
                text.clear();
                say("Ctrl-D leaves");
            }
            Err(ReadlineError::Eof) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session() -> Session {
        let conversation = Conversation {
            client: Client::new("http://127.0.0.1:9", None).unwrap(),
            model: "m".into(),
            sampling: SamplingArgs::default(),
            seed: None,
        };
        Session::new(conversation, None)
    }

    #[test]
    fn a_message_is_kept_and_answered() {
        let mut session = session();
        assert!(matches!(session.step(" hello "), Step::Answer));
        assert_eq!(session.messages, [json!({"role": "user", "content": "hello"})]);
    }

    #[test]
    fn a_path_is_not_a_command() {
        let mut session = session();
        assert!(matches!(session.step("/usr/bin is what?"), Step::Answer));
        assert!(matches!(session.step("/nonsense"), Step::Nothing));
    }

    #[test]
    fn retry_takes_back_the_answer() {
        let mut session = session();
        assert!(matches!(session.step("/retry"), Step::Nothing));
        session.step("hello");
        session.messages.push(json!({"role": "assistant", "content": "hi"}));
        assert!(matches!(session.step("/retry"), Step::Answer));
        assert_eq!(session.messages.len(), 1);
    }

    #[test]
    fn a_new_system_prompt_starts_over() {
        let mut session = session();
        session.step("hello");
        session.step("/system be brief");
        assert_eq!((session.system.as_deref(), session.messages.len()), (Some("be brief"), 0));
        session.step("/set temperature 0.5");
        assert_eq!(session.conversation.sampling.temperature, Some(0.5));
    }
}
