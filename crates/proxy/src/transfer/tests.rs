//! Tests what dropping a transfer does in each state.

use std::time::Duration;

use axum::Router;
use axum::http::{HeaderMap, StatusCode};
use bytes::Bytes;
use serde_json::value::RawValue;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::cleanup::NO_MODEL;
use super::*;
use crate::body::serving_mode::GenerationKind;
use crate::{Parts, Proxy, Settings};
use xpyd_base::connector::{Connector, Nixl};
use xpyd_base::fleet::{EngineView, FleetStage, FleetView, Role};
use xpyd_base::proxy_config::{ProxyConfig, RequestDeadlines};

fn engine(role: Role, port: u16) -> Arc<EngineView> {
    let mut engine = EngineView::fixture(role, 0);
    engine.endpoint.port = port;
    Arc::new(engine)
}

/// Brings a transfer to a state with `go` and drops it. Returns the request that the decode engine got, and the
/// metrics.
async fn dropped(go: impl FnOnce(&mut Transfer, &EngineLease)) -> (Option<String>, String) {
    let (sender, mut received) = mpsc::channel(8);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let router = Router::new().fallback(move |body: String| async move {
        sender.send(body).await.expect("the test listens");
        StatusCode::NOT_FOUND
    });
    let mut server = JoinSet::new();
    server.spawn(async move { axum::serve(listener, router).await });
    let (prefill, engine) = (engine(Role::Prefill, 1), engine(Role::Decode, port));
    let (_fleet, view) = watch::channel(Arc::new(FleetView {
        generation: 1,
        stage: FleetStage::Ready,
        engines: vec![Arc::clone(&prefill), Arc::clone(&engine)],
    }));
    let minute = Duration::from_mins(1);
    let settings = Settings {
        parts: Parts::default(),
        connector: Connector::Nixl(Nixl {}),
        served_model_name: "m".into(),
        notifications: None,
        deadlines: RequestDeadlines {
            prefill: minute,
            handoff: minute,
            decode_idle: minute,
            kv_lease: None,
        },
        asks_engines: false,
        config: ProxyConfig {
            max_body: 1,
            max_in_flight: 1,
            ..ProxyConfig::default()
        },
    };
    let proxy = Proxy::new(settings, view.clone(), None);
    let context = CleanupContext {
        decode: Arc::new(EngineLease::acquire(&engine, &view).expect("an open engine")),
        headers: HeaderMap::new(),
        request_id: "r".into(),
        consume: ConsumeRequest::Original(
            GenerationKind::Completions,
            Bytes::from_static(br#"{"prompt":"x","max_tokens":9}"#),
        ),
        deadline: minute,
        prefill: None,
        decode_params: None,
        permit: Arc::new(proxy.0.admit().expect("a free place")),
    };
    let mut transfer = Transfer::reserve(&proxy.0, &Arc::new(Record::of_canary(&proxy.0)), context);
    let lease = EngineLease::acquire(&prefill, &view).expect("an open engine");
    go(&mut transfer, &lease);
    drop(lease);
    drop(transfer);
    proxy.0.cleanups.close();
    proxy.0.cleanups.wait().await;
    assert_eq!(
        (proxy.in_flight(), engine.load.is_idle(), prefill.load.is_idle()),
        (0, true, true),
        "the clean-up let everything go"
    );
    (received.try_recv().ok(), proxy.metrics_text())
}

fn pull() -> Handoff {
    let params = r#"{"remote_port": 1.0}"#.to_owned();
    Handoff::Pull(RawValue::from_string(params).expect("JSON"))
}

#[tokio::test]
async fn an_engine_is_not_idle_while_its_kv_waits() {
    let held = |handoff: fn() -> Handoff| {
        dropped(move |transfer, lease| {
            transfer.begin_prefill(lease, None);
            assert_eq!(lease.engine.load.kept(), 1);
            transfer.delivered(handoff());
            let waits = usize::from(matches!(handoff(), Handoff::Pull(_)));
            assert_eq!(lease.engine.load.kept(), waits, "KV that was pushed waits elsewhere");
        })
    };
    held(pull).await;
    held(|| Handoff::Pushed).await;
}

/// A state, how to reach it, and a check of the request that the decode engine must get.
type Cases<'test> = Vec<(
    &'test str,
    fn(&mut Transfer, &EngineLease),
    &'test dyn Fn(&Option<String>) -> bool,
)>;

#[tokio::test]
async fn cleanup_depends_on_the_transfers_progress() {
    let release = |sent: &Option<String>| {
        let sent = sent.as_deref().unwrap_or_default();
        sent.contains(NO_MODEL) && sent.contains(r#""kv_transfer_params":{"remote_port": 1.0}"#)
    };
    let consume = |sent: &Option<String>| sent.as_deref() == Some(r#"{"prompt":"x","max_tokens":1,"stream":false}"#);
    let nothing = Option::<String>::is_none;
    let table: Cases<'_> = vec![
        ("reserved", |_, _| {}, &nothing),
        (
            "prefilling",
            |transfer, lease| transfer.begin_prefill(lease, None),
            &nothing,
        ),
        ("pulled KV handed", |transfer, _| transfer.delivered(pull()), &release),
        (
            // The decode engine notifies the prefill engine itself when its client leaves.
            "pulled KV sent",
            |transfer, _| {
                transfer.delivered(pull());
                assert!(transfer.begin_decode().is_some());
                assert!(transfer.begin_decode().is_none(), "parameters are given out once");
            },
            &nothing,
        ),
        (
            "pulled KV refused",
            |transfer, _| {
                transfer.delivered(pull());
                transfer.begin_decode();
                transfer.refused();
            },
            &release,
        ),
        (
            "pushed KV handed",
            |transfer, _| transfer.delivered(Handoff::Pushed),
            &consume,
        ),
        (
            "pushed KV sent",
            |transfer, _| {
                transfer.delivered(Handoff::Pushed);
                transfer.begin_decode();
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
