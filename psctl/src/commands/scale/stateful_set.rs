//! The one number of a StatefulSet that may be changed: its scale subresource, asked with the rights of the pod's service account.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use reqwest::{Certificate, Client, Method, Url};
use serde::Deserialize;

use super::Args;
use crate::cli::Exit;

/// One call of the API server.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// A scale is some hundred bytes, and so is a refusal.
const REPLY_BYTES_MAX: usize = 1 << 20;

/// The scale of one StatefulSet.
pub(super) struct StatefulSet {
    client: Client,
    scale: Url,
    /// Read for each call, for it is changed from time to time. None: somebody on the way has one.
    token: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Scale {
    spec: Spec,
}

#[derive(Deserialize)]
struct Spec {
    /// Left out where it is 0.
    #[serde(default)]
    replicas: u32,
}

/// How the API server refuses.
#[derive(Default, Deserialize)]
struct Refusal {
    #[serde(default)]
    message: String,
}

impl StatefulSet {
    pub(super) fn find(args: &Args) -> anyhow::Result<Self> {
        let server = match &args.api_server {
            Some(server) => server.clone(),
            None => in_cluster()?,
        };
        let mut scale = Url::parse(&server)
            .map_err(|error| Exit::Usage(format!("--api-server {server}: {error}")))?;
        let loopback = matches!(scale.host_str(), Some("127.0.0.1" | "[::1]" | "localhost"));
        let encrypted = scale.scheme() == "https";
        if !(encrypted || scale.scheme() == "http" && loopback) {
            return Err(Exit::Usage(format!("--api-server {server}: https is needed")).into());
        }
        let namespace = match &args.namespace {
            Some(namespace) => namespace.clone(),
            None => read(&args.service_account, "namespace")
                .context("--namespace is needed outside a pod")?,
        };
        let path = [
            "apis",
            "apps",
            "v1",
            "namespaces",
            namespace.trim(),
            "statefulsets",
            &args.statefulset,
            "scale",
        ];
        scale
            .path_segments_mut()
            .map_err(|()| Exit::Usage(format!("--api-server {server} is no URL of a server")))?
            .pop_if_empty()
            .extend(path);
        // No client is made without, encrypted or not. Whoever came first has chosen the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut client = Client::builder().timeout(CALL_TIMEOUT).no_proxy();
        if encrypted {
            let authority = read(&args.service_account, "ca.crt")?;
            let authority = Certificate::from_pem_bundle(authority.as_bytes())
                .context("read ca.crt of the service account")?;
            client = client.tls_certs_only(authority);
        }
        let token = encrypted.then(|| args.service_account.join("token"));
        Ok(StatefulSet { client: client.build().context("make a client")?, scale, token })
    }

    pub(super) async fn replicas(&self) -> anyhow::Result<u32> {
        self.call(Method::GET, None).await
    }

    pub(super) async fn set_replicas(&self, count: u32) -> anyhow::Result<()> {
        let body = format!("{{\"spec\":{{\"replicas\":{count}}}}}");
        let now = self.call(Method::PATCH, Some(body)).await?;
        ensure!(now == count, "the API server made it {now} servers, not {count}");
        Ok(())
    }

    async fn call(&self, method: Method, body: Option<String>) -> anyhow::Result<u32> {
        let what = format!("{method} {}", self.scale);
        let mut request = self.client.request(method, self.scale.clone());
        if let Some(token) = &self.token {
            let token = std::fs::read_to_string(token)
                .with_context(|| format!("read {}", token.display()))?;
            request = request.bearer_auth(token.trim());
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/merge-patch+json").body(body);
        }
        let mut reply = request.send().await.with_context(|| what.clone())?;
        let status = reply.status();
        let mut text = Vec::new();
        while let Some(chunk) = reply.chunk().await.with_context(|| what.clone())? {
            ensure!(text.len() + chunk.len() <= REPLY_BYTES_MAX, "{what}: the reply is too long");
            text.extend_from_slice(&chunk);
        }
        if !status.is_success() {
            let refusal: Refusal = serde_json::from_slice(&text).unwrap_or_default();
            bail!("{what}: {status}: {}", refusal.message);
        }
        let scale: Scale =
            serde_json::from_slice(&text).with_context(|| format!("{what}: no scale"))?;
        Ok(scale.spec.replicas)
    }
}

fn read(folder: &Path, name: &str) -> anyhow::Result<String> {
    let path = folder.join(name);
    std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

/// As Kubernetes tells each pod.
fn in_cluster() -> anyhow::Result<String> {
    let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    match (variable("KUBERNETES_SERVICE_HOST"), variable("KUBERNETES_SERVICE_PORT")) {
        (Some(host), Some(port)) if host.contains(':') => Ok(format!("https://[{host}]:{port}")),
        (Some(host), Some(port)) => Ok(format!("https://{host}:{port}")),
        _ => Err(Exit::Usage(
            "this is no pod, and no local cluster was named: give --dir (or set DOWNPOUR_LOCAL) for one of `psctl local`, or --api-server, for example http://127.0.0.1:8001 with kubectl proxy beside it".into(),
        )
        .into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn find(server: &str, account: &Path) -> anyhow::Result<StatefulSet> {
        let account = account.to_str().expect("UTF-8");
        let words = ["scale", "3", "--api-server", server, "--service-account", account];
        StatefulSet::find(&Cli::try_parse_from(words).expect("valid").args)
    }

    #[test]
    fn a_token_is_sent_only_where_it_is_encrypted() {
        let account = tempfile::tempdir().expect("a folder");
        std::fs::write(account.path().join("namespace"), "training\n").expect("write");
        let proxied = find("http://127.0.0.1:8001", account.path()).expect("loopback");
        assert!(proxied.token.is_none());
        let scale = "/apis/apps/v1/namespaces/training/statefulsets/downpour-ps/scale";
        assert_eq!(proxied.scale.path(), scale);
        for server in ["http://10.0.0.1:8001", "http://127.0.0.1.example", "ftp://127.0.0.1", "?"] {
            let error = find(server, account.path()).err().expect(server);
            assert!(matches!(error.downcast_ref(), Some(Exit::Usage(_))), "{server}: {error:#}");
        }
        let error = find("https://10.0.0.1", account.path()).err().expect("no authority");
        assert!(format!("{error:#}").contains("ca.crt"), "{error:#}");
    }
}
