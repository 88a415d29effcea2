//! Hostile ZeroMQ peers: for the proxy's notification port and for an engine's side channel.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng as _, RngExt as _};

/// Timeout of a write: a peer that does not read must not block a storm.
const DEADLINE: Duration = Duration::from_secs(2);

fn connect(port: u16) -> io::Result<TcpStream> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let stream = TcpStream::connect_timeout(&address, DEADLINE)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    Ok(stream)
}

/// ZMTP 3.0 with the mechanism `NULL`.
fn greeting() -> Vec<u8> {
    let mut greeting = vec![0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0x7f, 3, 0];
    greeting.extend_from_slice(b"NULL");
    greeting.resize(64, 0);
    greeting
}

/// The header of a frame with an eight-byte length, whatever follows.
fn frame(flags: u8, length: u64, content: &[u8]) -> Vec<u8> {
    [&[flags | 2][..], &length.to_be_bytes(), content].concat()
}

fn message(content: &[u8]) -> Vec<u8> {
    frame(0, content.len() as u64, content)
}

/// Connects as a socket of this type.
fn shake_hands(port: u16, socket_type: &[u8]) -> io::Result<TcpStream> {
    let mut stream = connect(port)?;
    stream.write_all(&greeting())?;
    stream.read_exact(&mut [0; 64])?;
    let mut ready = b"\x05READY\x0bSocket-Type".to_vec();
    ready.extend_from_slice(&u32::try_from(socket_type.len()).unwrap_or(0).to_be_bytes());
    ready.extend_from_slice(socket_type);
    ready.extend_from_slice(b"\x08Identity\0\0\0\0");
    stream.write_all(&frame(4, ready.len() as u64, &ready))?;
    Ok(stream)
}

/// Fills a NIXL side channel with requests without reading the answers, until it stops reading. The channel serves no
/// client while the stream is open.
pub(crate) fn wedge(port: u16) -> io::Result<TcpStream> {
    let mut stream = shake_hands(port, b"REQ")?;
    let lookup = [b"\x01\x00".as_slice(), b"\x00\x11", b"\x93\xc4\x0cget_meta_msg\x00\x01"].concat();
    let many = lookup.repeat(200);
    for _ in 0..3000 {
        if stream.write_all(&many).is_err() {
            break;
        }
    }
    Ok(stream)
}

/// One attack on the notification port. The streams stay open until they are dropped.
pub(crate) fn attack_notifications(port: u16, random: &mut StdRng) -> io::Result<Vec<TcpStream>> {
    let claims = [1 << 20, 1 << 31, 1 << 40, u64::MAX >> 1, u64::MAX];
    let claim = claims[random.random_range(0..claims.len())];
    let mut stream = match random.random_range(0..8) {
        // A command before the handshake that claims to be huge.
        0 => {
            let mut stream = connect(port)?;
            stream.write_all(&greeting())?;
            stream.write_all(&frame(4, claim, b""))?;
            return Ok(vec![stream]);
        }
        1 => return garbage(port, random),
        _ => shake_hands(port, b"PUSH")?,
    };
    // The port can close the connection at any of these bytes, as it should.
    let _ = match random.random_range(0..5) {
        0 => stream.write_all(&frame(0, claim, &[b'x'; 1000])),
        // A complete message of 32 MiB.
        1 => stream
            .write_all(&frame(0, 32 << 20, b""))
            .and_then(|()| (0..32).try_for_each(|_| stream.write_all(&vec![b'x'; 1 << 20]))),
        // A message with endless parts.
        2 => (0..10_000).try_for_each(|_| stream.write_all(b"\x01\x08partpart")),
        3 => malformed(&mut stream),
        _ => spoofed(&mut stream, random),
    };
    Ok(vec![stream])
}

/// Connections with invalid or incomplete ZeroMQ.
fn garbage(port: u16, random: &mut StdRng) -> io::Result<Vec<TcpStream>> {
    (0..100)
        .map(|index| {
            let mut stream = connect(port)?;
            let mut bytes = greeting();
            if index % 2 == 0 {
                random.fill_bytes(&mut bytes);
            }
            bytes.truncate(random.random_range(1..64));
            stream.write_all(&bytes)?;
            Ok(stream)
        })
        .collect()
}

/// Messages that are not msgpack, or claim more than they hold.
fn malformed(stream: &mut TcpStream) -> io::Result<()> {
    let messages: [&[u8]; 8] = [
        b"",
        &[0xff; 200],
        b"\x93\x01\x02\x03",
        b"\x82\xa4type",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        &[0x81; 200],
        &[0x91; 4000],
    ];
    messages
        .iter()
        .try_for_each(|content| stream.write_all(&message(content)))
}

/// Notifications of hand-offs that do not exist.
fn spoofed(stream: &mut TcpStream, random: &mut StdRng) -> io::Result<()> {
    (0..10_000).try_for_each(|_| {
        let request = format!("{:032x}", random.random::<u128>());
        let content = [
            b"\x82\xa4type\xaaProxyNotif\xa6req_id\xd9\x20".as_slice(),
            request.as_bytes(),
        ]
        .concat();
        stream.write_all(&message(&content))
    })
}
