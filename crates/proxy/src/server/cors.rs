//! Which web pages of other origins can use the API, decided as vLLM's server does (`CORSMiddleware` of Starlette).
//!
//! Pure. A browser sends a preflight before a request to another origin, and shows a page the answer only if its
//! headers allow it.

use axum::body::Body;
use axum::http::header::{self, HeaderName};
use axum::http::{HeaderMap, HeaderValue, Method, Response, StatusCode};

use xpyd_base::proxy_config::Cors;

/// All methods, in Starlette's order.
const METHODS: &str = "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT";

/// Headers that every page can send.
const SAFE_HEADERS: [&str; 4] = ["Accept", "Accept-Language", "Content-Language", "Content-Type"];

/// Seconds for which a browser caches the answer to a preflight.
const MAX_AGE: &str = "600";

const VARY: &str = "Origin, Access-Control-Request-Method, Access-Control-Request-Headers, \
                    Access-Control-Request-Private-Network";

/// Whether a request is a browser's preflight.
pub(crate) fn is_preflight(method: &Method, headers: &HeaderMap) -> bool {
    *method == Method::OPTIONS
        && headers.contains_key(header::ORIGIN)
        && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

fn has_all(list: &[String]) -> bool {
    list.iter().any(|item| item == "*")
}

fn allows(cors: &Cors, origin: &HeaderValue) -> bool {
    let is_same = |allowed: &String| allowed.as_bytes() == origin.as_bytes();
    has_all(&cors.allowed_origins) || cors.allowed_origins.iter().any(is_same)
}

/// The answer to a preflight.
pub(crate) fn preflight(cors: &Cors, asked: &HeaderMap) -> Response<Body> {
    let mut headers = HeaderMap::new();
    let mut put = |name: HeaderName, text: &str| {
        headers.extend(HeaderValue::from_str(text).ok().map(|value| (name, value)));
    };
    let text = |name: HeaderName| asked.get(name).and_then(|value| value.to_str().ok());
    let mut refused = Vec::new();
    put(header::VARY, VARY);
    put(header::ACCESS_CONTROL_MAX_AGE, MAX_AGE);
    match asked.get(header::ORIGIN) {
        Some(origin) if allows(cors, origin) => {
            let is_any = has_all(&cors.allowed_origins) && !cors.allow_credentials;
            let allowed_value = if is_any {
                "*"
            } else {
                text(header::ORIGIN).unwrap_or_default()
            };
            put(header::ACCESS_CONTROL_ALLOW_ORIGIN, allowed_value);
        }
        _ => refused.push("origin"),
    }
    let methods = if has_all(&cors.allowed_methods) {
        METHODS.to_owned()
    } else {
        cors.allowed_methods.join(", ")
    };
    let method = text(header::ACCESS_CONTROL_REQUEST_METHOD).unwrap_or_default();
    if !methods.split(", ").any(|allowed| allowed == method) {
        refused.push("method");
    }
    put(header::ACCESS_CONTROL_ALLOW_METHODS, &methods);
    let wanted = text(header::ACCESS_CONTROL_REQUEST_HEADERS);
    if has_all(&cors.allowed_headers) {
        put(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted.unwrap_or_default());
    } else {
        let mut allowed: Vec<&str> = cors
            .allowed_headers
            .iter()
            .map(String::as_str)
            .chain(SAFE_HEADERS)
            .collect();
        allowed.sort_unstable();
        allowed.dedup();
        put(header::ACCESS_CONTROL_ALLOW_HEADERS, &allowed.join(", "));
        let is_allowed = |name: &str| allowed.iter().any(|allowed| allowed.eq_ignore_ascii_case(name.trim()));
        if wanted.is_some_and(|wanted| !wanted.split(',').all(is_allowed)) {
            refused.push("headers");
        }
    }
    if cors.allow_credentials {
        put(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, "true");
    }
    if asked.contains_key("access-control-request-private-network") {
        refused.push("private-network");
    }
    put(header::CONTENT_TYPE, "text/plain; charset=utf-8");
    let mut response = if refused.is_empty() {
        Response::new(Body::from("OK"))
    } else {
        let mut response = Response::new(Body::from(format!("Disallowed CORS {}", refused.join(", "))));
        *response.status_mut() = StatusCode::BAD_REQUEST;
        response
    };
    *response.headers_mut() = headers;
    response
}

/// Sets the CORS headers of an answer. Without configured origins, the engines' headers stay.
pub(crate) fn mark(cors: &Cors, origin: Option<&HeaderValue>, headers: &mut HeaderMap) {
    if cors.allowed_origins.is_empty() {
        return;
    }
    for name in [
        header::ACCESS_CONTROL_ALLOW_ORIGIN,
        header::ACCESS_CONTROL_ALLOW_CREDENTIALS,
        header::ACCESS_CONTROL_EXPOSE_HEADERS,
    ] {
        headers.remove(name);
    }
    let is_any = has_all(&cors.allowed_origins) && !cors.allow_credentials;
    if let Some(origin) = origin.filter(|origin| allows(cors, origin)) {
        let allowed_value = if is_any {
            HeaderValue::from_static("*")
        } else {
            origin.clone()
        };
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, allowed_value);
    }
    if cors.allow_credentials && origin.is_some() {
        let allowed_value = HeaderValue::from_static("true");
        headers.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, allowed_value);
    }
    headers.append(header::VARY, HeaderValue::from_static("Origin"));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cors(origins: &[&str]) -> Cors {
        Cors {
            allowed_origins: origins.iter().map(|origin| (*origin).to_owned()).collect(),
            ..Cors::default()
        }
    }

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pairs = pairs.iter();
        pairs
            .map(|(name, value)| (HeaderName::from_static(name), value.parse().expect("a value")))
            .collect()
    }

    /// Status, allowed origin, methods and headers of a preflight.
    fn ask(cors: &Cors, origin: &str, method: &str, wanted: &str) -> (u16, [String; 3]) {
        let asked = headers(&[
            ("origin", origin),
            ("access-control-request-method", method),
            ("access-control-request-headers", wanted),
        ]);
        assert!(is_preflight(&Method::OPTIONS, &asked) && !is_preflight(&Method::GET, &asked));
        let response = preflight(cors, &asked);
        let allowed_value = ["origin", "methods", "headers"].map(|what| {
            let value = response.headers().get(format!("access-control-allow-{what}"));
            value.map_or("", |value| value.to_str().expect("text")).to_owned()
        });
        (response.status().as_u16(), allowed_value)
    }

    #[test]
    fn a_preflight_is_answered_as_vllm_answers_it() {
        let wanted = "authorization,content-type";
        let all = |origin: &str| [origin.to_owned(), METHODS.to_owned(), wanted.to_owned()];
        assert_eq!(ask(&cors(&["*"]), "http://a", "POST", wanted), (200, all("*")));
        assert_eq!(
            ask(&cors(&["http://a"]), "http://a", "POST", wanted),
            (200, all("http://a"))
        );
        assert_eq!(ask(&cors(&["http://a"]), "http://b", "POST", wanted), (400, all("")));
        assert_eq!(ask(&cors(&[]), "http://a", "POST", wanted), (400, all("")));
        let mut strict = cors(&["*"]);
        strict.allow_credentials = true;
        assert_eq!(ask(&strict, "http://a", "POST", wanted), (200, all("http://a")));
        strict.allowed_methods = vec!["GET".into()];
        strict.allowed_headers = vec!["X-A".into()];
        let allowed_value = [
            "http://a",
            "GET",
            "Accept, Accept-Language, Content-Language, Content-Type, X-A",
        ]
        .map(str::to_owned);
        assert_eq!(
            ask(&strict, "http://a", "GET", "x-a, content-type"),
            (200, allowed_value.clone())
        );
        assert_eq!(ask(&strict, "http://a", "POST", "x-a"), (400, allowed_value.clone()));
        assert_eq!(ask(&strict, "http://a", "GET", wanted), (400, allowed_value));
    }

    #[test]
    fn answers_name_the_allowed_origin() {
        let allowed_value = |cors: &Cors, origin: Option<&str>| {
            let mut answer = headers(&[("access-control-allow-origin", "of an engine"), ("vary", "x")]);
            mark(
                cors,
                origin.map(|origin| origin.parse().expect("a value")).as_ref(),
                &mut answer,
            );
            let allowed = answer.get(header::ACCESS_CONTROL_ALLOW_ORIGIN);
            let allowed = allowed.map(|value| value.to_str().expect("text").to_owned());
            (allowed, answer.get_all(header::VARY).iter().count())
        };
        assert_eq!(
            allowed_value(&cors(&[]), Some("http://a")),
            (Some("of an engine".into()), 1)
        );
        assert_eq!(allowed_value(&cors(&["*"]), Some("http://a")), (Some("*".into()), 2));
        assert_eq!(
            allowed_value(&cors(&["http://a"]), Some("http://a")),
            (Some("http://a".into()), 2)
        );
        assert_eq!(allowed_value(&cors(&["http://a"]), Some("http://b")), (None, 2));
        assert_eq!(allowed_value(&cors(&["*"]), None), (None, 2));
        let mut with_cookies = cors(&["*"]);
        with_cookies.allow_credentials = true;
        assert_eq!(
            allowed_value(&with_cookies, Some("http://a")),
            (Some("http://a".into()), 2)
        );
    }
}
