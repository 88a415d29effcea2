//! What dropping an entry does, for every stage.

use axum::Router;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::*;
use crate::connector::{Connector, Nixl};
use crate::fleet::{Endpoint, EngineId, EngineState, EngineView, FleetStage, FleetView, Incarnation, Load, Role};
use crate::proxy::{Proxy, Settings};
use crate::service::Service;

/// Brings an entry to where `go` leaves it, drops it, and returns what the decode engine was sent, and the metrics.
async fn dropped(go: impl FnOnce(&mut Entry)) -> (Option<String>, String) {
    let (sender, mut received) = mpsc::channel(8);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let router = Router::new().fallback(move |body: String| async move {
        sender.send(body).await.expect("the test listens");
        StatusCode::NOT_FOUND
    });
    let mut server = JoinSet::new();
    server.spawn(async move { axum::serve(listener, router).await });
    let engine = EngineView {
        id: EngineId::new(Role::Decode, 0),
        role: Role::Decode,
        incarnation: Incarnation::FIRST,
        state: EngineState::Ready,
        endpoint: Endpoint {
            host: "127.0.0.1".into(),
            port,
            tensor_parallel: 1,
            receiver: None,
        },
        pid: None,
        reason: None,
        restart_at: None,
        load: Arc::new(Load::default()),
    };
    let engine = Arc::new(engine);
    let (_fleet, view) = watch::channel(Arc::new(FleetView {
        generation: 1,
        stage: FleetStage::Ready,
        engines: vec![Arc::clone(&engine)],
    }));
    let minute = Duration::from_mins(1);
    let settings = Settings {
        client_keys: crate::proxy::ClientKeys::default(),
        engine_key: None,
        access_log: None,
        traces: None,
        connector: Connector::Nixl(Nixl {}),
        served_model_name: "m".into(),
        session_header: None,
        notifications: None,
        prefill_deadline: minute,
        handoff_deadline: minute,
        decode_idle_deadline: minute,
        max_body_bytes: 1,
        max_in_flight: 1,
        service: Service::default(),
    };
    let proxy = Proxy::new(settings, view.clone(), None);
    let care = Care {
        decode: Arc::new(Seat::take(&engine, &view).expect("an open engine")),
        headers: HeaderMap::new(),
        request_id: "r".into(),
        consume: Consume::Original(
            Kind::Completions,
            Bytes::from_static(br#"{"prompt":"x","max_tokens":9}"#),
        ),
        deadline: minute,
        _permit: Arc::new(proxy.0.admit().expect("a free place")),
    };
    let mut entry = Entry::reserve(&proxy.0, &Arc::new(Record::of_canary(&proxy.0)), care);
    go(&mut entry);
    drop(entry);
    proxy.0.cleanups.close();
    proxy.0.cleanups.wait().await;
    assert_eq!(
        (proxy.in_flight(), engine.load.in_flight()),
        (0, 0),
        "the clean-up let everything go"
    );
    (received.try_recv().ok(), proxy.metrics_text())
}

fn pull() -> Handoff {
    let params = r#"{"remote_port": 1.0}"#.to_owned();
    Handoff::Pull(RawValue::from_string(params).expect("JSON"))
}

/// How far a hand-off came, how to bring it there, and what the decode engine must be sent.
type Table<'test> = Vec<(&'test str, fn(&mut Entry), &'test dyn Fn(&Option<String>) -> bool)>;

#[tokio::test]
async fn what_is_owed_depends_on_how_far_the_handoff_came() {
    let release = |sent: &Option<String>| {
        let sent = sent.as_deref().unwrap_or_default();
        sent.contains(NO_MODEL) && sent.contains(r#""kv_transfer_params":{"remote_port": 1.0}"#)
    };
    let consume = |sent: &Option<String>| sent.as_deref() == Some(r#"{"prompt":"x","max_tokens":1,"stream":false}"#);
    let nothing = Option::<String>::is_none;
    let table: Table<'_> = vec![
        ("reserved", |_| {}, &nothing),
        ("prefilling", |entry| entry.prefilling(None), &nothing),
        ("pulled KV handed", |entry| entry.handed(pull()), &release),
        (
            // The decode engine tells the prefill engine by itself when its client leaves.
            "pulled KV sent",
            |entry| {
                entry.handed(pull());
                assert!(entry.send().is_some());
                assert!(entry.send().is_none(), "parameters are given out once");
            },
            &nothing,
        ),
        (
            "pulled KV refused",
            |entry| {
                entry.handed(pull());
                entry.send();
                entry.refused();
            },
            &release,
        ),
        ("pushed KV handed", |entry| entry.handed(Handoff::Pushed), &consume),
        (
            "pushed KV sent",
            |entry| {
                entry.handed(Handoff::Pushed);
                entry.send();
            },
            &consume,
        ),
    ];
    for (case, go, expected) in table {
        let (sent, metrics) = dropped(go).await;
        assert!(expected(&sent), "{case}: {sent:?}");
        assert!(metrics.contains("xpyd_handoffs_open 0"), "{case}");
        assert_eq!(
            metrics.contains(r#"xpyd_handoff_cleanups_total{outcome="freed"} 1"#),
            sent.is_some(),
            "{case}"
        );
    }
}
