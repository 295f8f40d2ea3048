//! A client that costs little: requests are bytes made beforehand, answers are read by hand.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use rustix::event::epoll;
use serde_json::{Value, json};

use crate::{Clock, model};

/// Enough for the answers here.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// What is asked for.
#[derive(Clone, Copy)]
pub enum Load {
    Chat,
    Completion,
    ChatStream,
    CompletionStream,
}

impl Load {
    pub const ALL: [Load; 4] =
        [Load::Chat, Load::Completion, Load::ChatStream, Load::CompletionStream];

    pub fn name(self) -> &'static str {
        match self {
            Load::Chat => "chat, whole",
            Load::Completion => "completion, whole",
            Load::ChatStream => "chat, streamed",
            Load::CompletionStream => "completion, streamed",
        }
    }

    pub fn streamed(self) -> bool {
        matches!(self, Load::ChatStream | Load::CompletionStream)
    }

    fn request(self) -> Vec<u8> {
        match self {
            Load::Chat | Load::ChatStream => chat(self.streamed(), 0),
            Load::Completion | Load::CompletionStream => {
                let prompt = "Once upon a time there was a gardener whose apples fell upwards, and";
                let body =
                    json!({ "model": model::NAME, "prompt": prompt, "stream": self.streamed() });
                post("/v1/completions", &body)
            }
        }
    }

    /// Whether an answer is whole.
    fn is_over(self, answer: &[u8]) -> bool {
        if self.streamed() {
            return answer.ends_with(b"\r\n0\r\n\r\n");
        }
        let text = std::str::from_utf8(answer).unwrap();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        body.len() == length.unwrap().parse::<usize>().unwrap()
    }
}

fn chat(stream: bool, seed: usize) -> Vec<u8> {
    let body = json!({
        "model": model::NAME,
        "messages": model::messages(),
        "temperature": 0.7,
        "max_tokens": 1000,
        "seed": seed,
        "stream": stream,
    });
    post("/v1/chat/completions", &body)
}

fn post(path: &str, body: &Value) -> Vec<u8> {
    let body = body.to_string();
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n"
    );
    (head + &body).into_bytes()
}

fn connect(address: SocketAddr) -> TcpStream {
    let socket = TcpStream::connect(address).unwrap();
    socket.set_nodelay(true).unwrap();
    socket
}

/// Keeps a request under way on each connection; how many were answered, in how many seconds.
/// Connections are read in turn: two calls of the system for each request, and no other.
pub fn saturate(
    address: SocketAddr,
    load: Load,
    connections: usize,
    time: Duration,
) -> (usize, f64) {
    let request = load.request();
    let mut sockets: Vec<TcpStream> = (0..connections).map(|_| connect(address)).collect();
    let mut buffer = vec![0; ANSWER_BYTES_MAX];
    sockets.iter_mut().for_each(|socket| socket.write_all(&request).unwrap());
    let begun = Instant::now();
    let mut answered = 0;
    let mut go_on = true;
    while go_on {
        go_on = begun.elapsed() < time;
        for socket in &mut sockets {
            let mut length = 0;
            while length == 0 || !load.is_over(&buffer[..length]) {
                let read = socket.read(&mut buffer[length..]).unwrap();
                assert!(read > 0, "the server hung up");
                length += read;
            }
            assert!(buffer.starts_with(b"HTTP/1.1 200 OK"), "the server refused");
            answered += 1;
            if go_on {
                socket.write_all(&request).unwrap();
            }
        }
    }
    (answered, begun.elapsed().as_secs_f64())
}

/// Reads streams to their ends; when each token was read, by stream. One thread that does nothing
/// else: a token costs it one call of the system, and a share of another where several have come.
pub fn read_streams(
    address: SocketAddr,
    streams: usize,
    tokens: usize,
    clock: Clock,
) -> Vec<Vec<u64>> {
    // It stands for machines of their own, and shall not wait until the server is done.
    pomona_device::ask_for_short_turns();
    let epoll = epoll::create(epoll::CreateFlags::empty()).unwrap();
    let mut readers: Vec<Reader> = (0..streams)
        .map(|seed| {
            let mut socket = connect(address);
            socket.write_all(&chat(true, seed)).unwrap();
            socket.set_nonblocking(true).unwrap();
            let data = epoll::EventData::new_u64(seed as u64);
            epoll::add(&epoll, &socket, data, epoll::EventFlags::IN).unwrap();
            Reader { socket, read: Vec::with_capacity(tokens + 4), last: 0 }
        })
        .collect();
    let mut buffer = vec![0; ANSWER_BYTES_MAX];
    let mut events = Vec::with_capacity(streams);
    let mut open = streams;
    while open > 0 {
        events.clear();
        epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), None).unwrap();
        for event in &events {
            let reader = &mut readers[event.data.u64() as usize];
            reader.take(&mut buffer, clock);
            // An event ends in an empty line. The first tells the role, the last two are no tokens.
            if reader.read.len() >= tokens + 3 {
                epoll::delete(&epoll, &reader.socket).unwrap();
                open -= 1;
            }
        }
    }
    readers.into_iter().map(|reader| reader.read[1..=tokens].to_vec()).collect()
}

struct Reader {
    socket: TcpStream,
    /// When each event was read.
    read: Vec<u64>,
    last: u8,
}

impl Reader {
    fn take(&mut self, buffer: &mut [u8], clock: Clock) {
        let length = self.socket.read(buffer).unwrap();
        assert!(length > 0, "the server hung up");
        let now = clock.now();
        for byte in &buffer[..length] {
            if (self.last, *byte) == (b'\n', b'\n') {
                self.read.push(now);
            }
            self.last = *byte;
        }
    }
}
