//! What the entrance of the proxy lets through to engines: keys, and the headers that would steer them.

use xpyd::connector::{Connector, Nixl};
use xpyd::proxy::{ClientKeys, EngineKey, Settings};

use super::fake::{self, COMPLETION, Fake, Rig, answer, nixl_prefilled};
use super::{code, decoder, prefiller};

/// A proxy with a key of its own over two engines that are sent another.
async fn guarded(pass_key_through: bool) -> (Fake, Fake, Rig) {
    let (prefill, decode) = (prefiller().await, decoder().await);
    let mut settings = Settings {
        client_keys: ClientKeys::read("clients").unwrap(),
        engine_key: Some(EngineKey::new("engines").unwrap()),
        ..fake::settings(Connector::Nixl(Nixl {}))
    };
    settings.service.guard.pass_key_through = pass_key_through;
    let rig = Rig::start(settings, &[prefill.port], &[decode.port], 1, None).await;
    (prefill, decode, rig)
}

#[tokio::test]
async fn a_checked_key_stays_at_the_proxy_unless_it_is_to_be_passed_through() {
    for (pass_through, sent) in [(false, "Bearer engines"), (true, "Bearer clients")] {
        let (prefill, decode, rig) = guarded(pass_through).await;
        let request = |path: &str| {
            rig.post(path, r#"{"prompt":"x"}"#)
                .header("authorization", "Bearer clients")
        };
        assert_eq!(request("/v1/completions").send().await.unwrap().status(), 200);
        assert_eq!(request("/tokenize").send().await.unwrap().status(), 200);
        for seen in [prefill.seen(), decode.seen()].concat() {
            assert_eq!(seen.headers["authorization"], sent, "{}", seen.path);
        }
        rig.finish().await;
    }
}

#[tokio::test]
async fn who_bears_no_key_reaches_no_engine_and_is_told_what_is_missing() {
    let (prefill, decode, rig) = guarded(false).await;
    let response = rig.post("/v1/completions", r#"{"prompt":"x"}"#).send().await.unwrap();
    assert_eq!(response.status(), 401);
    assert_eq!(response.headers()["www-authenticate"], "Bearer");
    assert_eq!(code(&response.text().await.unwrap()), "invalid_api_key");
    // Not even whether a route exists is told.
    assert_eq!(rig.get("/unknown").await.status(), 401);
    assert_eq!(rig.get("/health").await.status(), 200);
    assert_eq!((prefill.seen().len(), decode.seen().len()), (0, 0));
    rig.finish().await;
}

#[tokio::test]
async fn without_keys_of_its_own_the_proxy_passes_the_clients_on_and_adds_none() {
    let prefill = Fake::start(|_| async { nixl_prefilled() }).await;
    let decode = Fake::start(|_| async { answer(200, COMPLETION) }).await;
    let settings = Settings {
        engine_key: Some(EngineKey::new("engines").unwrap()),
        ..fake::settings(Connector::Nixl(Nixl {}))
    };
    let rig = Rig::start(settings, &[prefill.port], &[decode.port], 1, None).await;
    let body = r#"{"prompt":"x"}"#;
    rig.complete(body).await;
    let own = rig.post("/v1/completions", body).header("authorization", "Bearer own");
    own.send().await.unwrap();
    for seen in [prefill.seen(), decode.seen()] {
        let keys: Vec<_> = seen.iter().map(|seen| seen.headers.get("authorization")).collect();
        assert_eq!(keys[0], None, "nobody uses the fleet's key without having shown one");
        assert_eq!(keys[1].unwrap(), "Bearer own");
    }
    rig.finish().await;
}
