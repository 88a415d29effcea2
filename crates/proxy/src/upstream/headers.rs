//! Every header that an engine gets, and which of a client's headers are forwarded.
//!
//! A traced leg also gets `traceparent` from `telemetry::traces`.

use std::collections::HashSet;

use axum::http::{HeaderMap, HeaderName, Method};
use hyper::header;

use super::Call;
use crate::Shared;

/// Headers that belong to one connection (RFC 9110 §7.6.1), that the proxy sets itself, or that request a partial or
/// encoded answer, which it could not read.
const NOT_FORWARDED: [HeaderName; 20] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::HOST,
    header::CONTENT_LENGTH,
    header::EXPECT,
    header::ACCEPT_ENCODING,
    HeaderName::from_static("http2-settings"),
    header::RANGE,
    header::IF_RANGE,
    header::IF_MATCH,
    header::IF_NONE_MATCH,
    header::IF_MODIFIED_SINCE,
    header::IF_UNMODIFIED_SINCE,
];

/// The request id header. A client's own id is returned to it and logged; engines get another one.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Client headers that steer vLLM 0.32. The request id pairs KV with requests, a session decides how long KV is kept,
/// and the format of load metrics makes an engine report its own load.
const STEERING: [&str; 3] = ["x-request-id", "x-session-id", "endpoint-load-metrics-format"];

/// Prefixes of headers that steer it more directly, today by priority and rank, and perhaps in other ways later.
const STEERING_PREFIXES: [&str; 3] = ["x-vllm-", "x-data-parallel-", "x-kv-"];

fn steers(name: &str) -> bool {
    STEERING.contains(&name) || STEERING_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// The headers that can cross from one connection to another.
pub(crate) fn forwardable(headers: &HeaderMap) -> HeaderMap {
    let named: HashSet<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    headers
        .iter()
        .filter(|(name, _)| !NOT_FORWARDED.contains(name) && !steers(name.as_str()) && !named.contains(*name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

impl Call<'_> {
    /// The header section of the call.
    pub(super) fn head(&self, authority: &str) -> Vec<u8> {
        let mut head = Vec::with_capacity(512);
        let mut put = |parts: &[&[u8]]| parts.iter().for_each(|part| head.extend_from_slice(part));
        put(&[
            self.method.as_str().as_bytes(),
            b" ",
            self.path.as_bytes(),
            b" HTTP/1.1\r\nhost: ",
        ]);
        // Without this header any encoding is acceptable (RFC 9110 §12.5.3).
        put(&[authority.as_bytes(), b"\r\naccept-encoding: identity\r\n"]);
        let replaced = |name| self.request_id.is_some() && (name == header::CONTENT_TYPE || name == REQUEST_ID);
        for (name, value) in self.headers.iter().filter(|(name, _)| !replaced(*name)) {
            put(&[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"]);
        }
        if let Some(id) = self.request_id {
            put(&[
                b"content-type: application/json\r\nx-request-id: ",
                id.as_bytes(),
                b"\r\n",
            ]);
        }
        if self.method == Method::POST || !self.body.is_empty() {
            put(&[b"content-length: ", self.body.len().to_string().as_bytes(), b"\r\n"]);
        }
        put(&[b"\r\n"]);
        head
    }
}

impl Shared {
    /// The headers that an engine gets of a client's request. If xpyd has checked the client's key, the engines' key
    /// replaces it, unless it is passed through. If only xpyd knows the engines' key, it always replaces the
    /// client's.
    pub(crate) fn engine_headers(&self, headers: &HeaderMap) -> HeaderMap {
        let mut forwarded = forwardable(headers);
        let parts = &self.settings.parts;
        let is_checked = !parts.client_keys.is_empty() && !self.settings.config.guard.pass_key_through;
        if is_checked || matches!(&parts.engine_key, Some(key) if key.is_xpyds_own()) {
            forwarded.remove(header::AUTHORIZATION);
            if let Some(key) = &parts.engine_key {
                key.add_to(&mut forwarded);
            }
        }
        forwarded
    }

    /// The headers of xpyd's own calls to engines.
    pub(crate) fn own_headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        if let Some(key) = &self.settings.parts.engine_key {
            key.add_to(&mut headers);
        }
        headers
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn connection_and_steering_headers_are_not_forwarded() {
        let pairs = [
            ("connection", "close, x-secret-hop"),
            ("x-secret-hop", "1"),
            ("keep-alive", "5"),
            ("proxy-connection", "keep-alive"),
            ("transfer-encoding", "chunked"),
            ("content-length", "9"),
            ("host", "me"),
            ("x-request-id", "mine"),
            ("x-data-parallel-rank", "3"),
            ("X-Data-Parallel-Rank-Of-Tomorrow", "3"),
            ("X-Vllm-Priority", "-9"),
            ("x-session-id", "s"),
            ("x-kv-engine", "e"),
            ("endpoint-load-metrics-format", "JSON"),
            ("accept-encoding", "gzip"),
            ("te", "trailers"),
            ("trailer", "x"),
            ("upgrade", "h2c"),
            ("http2-settings", "x"),
            ("expect", "100-continue"),
            ("range", "bytes=0-1"),
            ("if-range", "x"),
            ("if-match", "x"),
            ("if-none-match", "x"),
            ("if-modified-since", "x"),
            ("if-unmodified-since", "x"),
            ("session-id", "s"),
            ("authorization", "Bearer x"),
            ("traceparent", "00-1"),
        ];
        let headers: HeaderMap = pairs
            .iter()
            .map(|(name, value)| {
                (
                    name.parse::<HeaderName>().unwrap(),
                    value.parse::<HeaderValue>().unwrap(),
                )
            })
            .collect();
        let kept = forwardable(&headers);
        let mut names: Vec<_> = kept.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["authorization", "session-id", "traceparent"]);
    }
}
