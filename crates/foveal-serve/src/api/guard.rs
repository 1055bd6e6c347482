//! What stands before every request: who asks, from where, and what browsers are told about every answer.
//!
//! Without keys only this machine can ask, and no page of another site may do it through a browser here: such requests name
//! another host, or come with another origin. There are no CORS headers, so that other sites can't read answers either.

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::App;
use super::failure::Failure;
use crate::page;

/// Only what this server itself gives is loaded, nothing is framed, no form goes anywhere.
const CONTENT: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; \
                       base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub(crate) async fn guard(State(app): State<App>, request: Request, next: Next) -> Response {
    let mut response = match check(&app, &request) {
        Ok(()) => next.run(request).await,
        Err(failure) => failure.into_response(),
    };
    if response.status().as_u16() >= 400 {
        app.refused.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, CONTENT),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    let cached = response.headers().contains_key(header::CACHE_CONTROL);
    if !cached {
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    response
}

fn check(app: &App, request: &Request) -> Result<(), Failure> {
    let (headers, keys) = (request.headers(), &app.options.keys);
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    if keys.is_empty() && !is_this_machine(host) {
        let message = "without keys this server answers to localhost alone, and the request names another host";
        return Err(Failure::new(StatusCode::FORBIDDEN, "foreign_host", message));
    }
    if let Some(origin) = headers.get(header::ORIGIN)
        && !is_own(origin, host)
    {
        let message = "the request comes from a page of another site";
        return Err(Failure::new(StatusCode::FORBIDDEN, "foreign_origin", message));
    }
    let path = request.uri().path();
    let open = path == "/health" || page::is_asset(path);
    if open || keys.is_empty() || key(headers).is_some_and(|key| keys.allow(key)) {
        return Ok(());
    }
    let message = "this server needs a key: Authorization: Bearer KEY";
    Err(Failure::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message))
}

fn key(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}

/// Whether a `Host` header names this machine; a request of HTTP/1.0 need not have one.
fn is_this_machine(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    matches!(name, "" | "localhost" | "127.0.0.1" | "[::1]")
}

fn is_own(origin: &HeaderValue, host: &str) -> bool {
    let origin = origin.to_str().unwrap_or_default();
    let origin = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
    origin.is_some_and(|origin| origin == host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_of_this_machine() {
        for host in ["localhost", "localhost:8080", "127.0.0.1:1", "[::1]:80", "[::1]", ""] {
            assert!(is_this_machine(host), "{host}");
        }
        for host in
            ["evil.example", "localhost.evil.example", "127.0.0.1.evil:80", "0.0.0.0", "::2"]
        {
            assert!(!is_this_machine(host), "{host}");
        }
    }

    #[test]
    fn keys_come_as_bearer() {
        let with = |value: &'static str| {
            let value = HeaderValue::from_static(value);
            HeaderMap::from_iter([(header::AUTHORIZATION, value)])
        };
        assert_eq!(key(&with("Bearer abc")), Some(&b"abc"[..]));
        assert_eq!(key(&with("bearer  abc ")), Some(&b"abc"[..]));
        assert_eq!(key(&with("Basic abc")), None);
        assert_eq!(key(&with("abc")), None);
        assert_eq!(key(&HeaderMap::new()), None);
    }
}
