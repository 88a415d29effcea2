//! Tests of the flags of `xpyd proxy` and their defaults.

use clap::Parser;

use super::*;

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    arguments: Arguments,
}

fn parse(line: &str) -> Result<(Vec<Endpoint>, Vec<Endpoint>), FlagError> {
    let words = std::iter::once("proxy").chain(line.split_whitespace());
    endpoints(&Command::try_parse_from(words).expect("well-formed flags").arguments)
}

fn addresses(endpoints: &[Endpoint]) -> Vec<String> {
    endpoints.iter().map(Endpoint::authority).collect()
}

fn receivers(endpoints: &[Endpoint]) -> Vec<(String, Vec<u16>, Vec<u16>)> {
    let receivers = endpoints.iter().filter_map(|endpoint| endpoint.receiver.clone());
    receivers
        .map(|receiver| (receiver.host, receiver.init_ports, receiver.alloc_ports))
        .collect()
}

#[test]
fn defaults_are_those_of_a_profile() {
    let Command { arguments } = Command::try_parse_from(["proxy"]).expect("well-formed flags");
    let profile = crate::profile::load("2p2d", &[]).expect("a shipped profile");
    let (proxy, deadlines) = (profile.proxy, profile.deadlines);
    assert_eq!((&arguments.host, arguments.port), (&proxy.host, proxy.port));
    assert_eq!(
        (arguments.max_body, arguments.max_in_flight),
        (proxy.max_body, proxy.max_in_flight)
    );
    let given = [
        arguments.prefill_deadline,
        arguments.handoff_deadline,
        arguments.decode_idle_deadline,
    ];
    assert_eq!(given, [deadlines.prefill, deadlines.handoff, deadlines.decode_idle]);
}

#[test]
fn lists_pair_up_as_in_the_reference_proxy() {
    let table: [(&str, &[&str], &[&str]); 5] = [
        ("", &["localhost:8100"], &["localhost:8200"]),
        (
            "--num-prefillers 2 --num-decoders 2 --prefiller-port 7100 --decoder-port 7200",
            &["localhost:7100", "localhost:7101"],
            &["localhost:7200", "localhost:7201"],
        ),
        (
            "--prefiller-host h1,h2 --prefiller-port 8000 --decoder-host h3,h4 --decoder-port 8000,8001",
            &["h1:8000", "h2:8000"],
            &["h3:8000", "h4:8001"],
        ),
        (
            "--prefiller-port 1,2,3 --num-prefillers 3 --decoder-host a,b --num-decoders 2",
            &["localhost:1", "localhost:2", "localhost:3"],
            &["a:8200", "b:8200"],
        ),
        (
            "--prefiller-host ::1 --decoder-host [::1]",
            &["[::1]:8100"],
            &["[::1]:8200"],
        ),
    ];
    for (line, prefill, decode) in table {
        let (prefillers, decoders) = parse(line).expect(line);
        assert_eq!(
            (addresses(&prefillers), addresses(&decoders)),
            (owned(prefill), owned(decode)),
            "{line}"
        );
    }
}

fn owned(texts: &[&str]) -> Vec<String> {
    texts.iter().map(ToString::to_string).collect()
}

#[test]
fn sessions_are_bound_on_request_only() {
    let header = |line: &str| {
        let words = std::iter::once("proxy").chain(line.split_whitespace());
        let arguments = Command::try_parse_from(words).expect("well-formed flags").arguments;
        config(&arguments)
            .expect("known options")
            .bound_session_header()
            .map(str::to_owned)
    };
    assert_eq!(header("--client-bound=false"), None);
    assert_eq!(header("--client-bound"), Some("session-id".into()));
    assert_eq!(
        header("--client-bound true --client-bound-key x-user"),
        Some("x-user".into())
    );
}

#[test]
fn decoders_of_one_host_never_share_receiver_ports() {
    let (prefill, decode) =
        parse("--num-decoders 2 --decoder-init-port 7300 --decoder-alloc-port 7400").expect("valid");
    assert_eq!(
        receivers(&decode),
        [
            ("localhost".into(), vec![7300], vec![7400]),
            ("localhost".into(), vec![7301], vec![7401])
        ]
    );
    assert_eq!(prefill[0].tensor_parallel, 1);
    let (prefill, decode) =
        parse("--num-decoders 2 --decoder-init-port 7300,7301 --decoder-alloc-port 7400,7401").expect("valid");
    assert_eq!(
        receivers(&decode),
        [
            ("localhost".into(), vec![7300, 7301], vec![7400, 7401]),
            ("localhost".into(), vec![7302, 7303], vec![7402, 7403])
        ]
    );
    assert_eq!(prefill[0].tensor_parallel, 2);
    let (_, decode) = parse("--decoder-host a,b").expect("valid");
    assert_eq!(
        receivers(&decode),
        [
            ("a".into(), vec![8300], vec![8400]),
            ("b".into(), vec![8300], vec![8400])
        ]
    );
    let (_, decode) = parse("--connector nixl --decoder-init-port 1,2").expect("valid");
    assert_eq!(receivers(&decode), []);
}

#[test]
fn contradicting_flags_are_named() {
    let table = [
        (
            "--prefiller-host a,b --prefiller-port 1,2,3",
            "`--prefiller-host` has 2 entries and `--prefiller-port` 3: both need the same number of entries, or \
             one of them a single entry",
        ),
        (
            "--decoder-host a,b --num-decoders 3",
            "`--num-decoders` is 3, but `--decoder-host` and `--decoder-port` name 2",
        ),
        ("--num-prefillers 0", "`--num-prefillers` must be at least 1"),
        (
            "--decoder-init-port 1,2",
            "`--decoder-init-port` has 2 entries and `--decoder-alloc-port` 1: both need one per tensor-parallel rank",
        ),
        (
            "--prefiller-port 65535 --num-prefillers 2",
            "`--prefiller-port` would need a port above 65535",
        ),
    ];
    for (line, message) in table {
        assert_eq!(parse(line).expect_err(line).to_string(), message, "{line}");
    }
}

#[test]
fn keys_with_a_flag_of_their_own_are_refused_by_set() {
    let Command { arguments } = Command::try_parse_from(["proxy", "--set", "port=1"]).expect("well-formed flags");
    let failure = config(&arguments).expect_err("a key with a flag");
    assert_eq!(failure.hints, ["use `--port` instead"]);
}
