//! A bucket: a process of its own that speaks S3.

mod support;

use std::io::Cursor;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use downpour_checkpoint::Error;
use downpour_checkpoint::catalog::Catalog;
use downpour_checkpoint::store::{Access, Store};
use downpour_checkpoint::write::Scratch;
use support::{JOB, checkpoint, python};
use tokio::net::TcpSocket;

/// Reads the environment, which a test cannot set for itself: the test runs again as a child of itself.
const CHILD: &str = "DOWNPOUR_TEST_S3_CHILD";

/// Its port is held: nobody is given it before the server listens, which may share it.
struct Server(Child, TcpSocket);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(path: &str) -> Server {
    let held = TcpSocket::new_v4().unwrap();
    held.set_reuseaddr(true).unwrap();
    held.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let port = held.local_addr().unwrap().port();
    let mut server = Command::new("python3");
    server.args(["-m", "moto.server", "-H", "127.0.0.1", "-p", &port.to_string()]);
    server.env("PYTHONPATH", path).stdout(Stdio::null()).stderr(Stdio::null());
    let server = Server(server.spawn().unwrap(), held);
    let deadline = Instant::now() + Duration::from_secs(60);
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline, "the S3 server did not start");
        std::thread::sleep(Duration::from_millis(50));
    }
    server
}

#[test]
fn a_bucket_is_as_good_as_a_directory() {
    if std::env::var_os(CHILD).is_some() {
        return tokio::runtime::Runtime::new().unwrap().block_on(in_a_bucket());
    }
    let Some(path) = python() else { return };
    let server = start(&path);
    let endpoint = format!("http://{}", server.1.local_addr().unwrap());
    let bucket = r#"
import boto3, sys
boto3.client("s3", endpoint_url=sys.argv[1], region_name="us-east-1").create_bucket(Bucket="models")
"#;
    let environment = [("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test")];
    let mut create = Command::new("python3");
    create.args(["-c", bucket, &endpoint]).env("PYTHONPATH", &path).envs(environment);
    assert!(create.status().unwrap().success());
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "a_bucket_is_as_good_as_a_directory", "--nocapture"]);
    child.envs(environment).env("AWS_REGION", "us-east-1").env("AWS_ENDPOINT", &endpoint);
    child.env("AWS_ALLOW_HTTP", "true").env(CHILD, "1");
    let output = child.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

async fn in_a_bucket() {
    let store = Store::open("s3://models/some/prefix/", Access::Write).unwrap();
    let scratch = Scratch::default();
    // One request, and parts.
    for bytes in [10usize, 20 << 20] {
        let content = || Cursor::new(vec![7; bytes]);
        let name = format!("files/{bytes}");
        let stored = store.create(&name, content()).await.unwrap();
        let again = store.create(&name, content()).await;
        assert!(matches!(again, Err(Error::Exists(_))), "{again:?}");
        store.fetch(&name, stored, &scratch).await.unwrap();
        let wrong =
            store.fetch(&name, downpour_checkpoint::store::Stored { crc32: 1, ..stored }, &scratch);
        assert!(matches!(wrong.await, Err(Error::Checksum { .. })));
    }
    let catalog = Catalog::new(store);
    let full = checkpoint(&catalog, 1, &[], 400).await;
    let one = checkpoint(&catalog, 2, &[&full], 30).await;
    let other = checkpoint(&catalog, 3, &[], 400).await;
    catalog.verify(one.clone(), &scratch, |_| {}).await.unwrap();
    assert_eq!(catalog.latest(JOB).await.unwrap(), other);
    let kept = catalog.keep(JOB, 1, &[]).await.unwrap();
    assert_eq!(kept.deleted, [one.checkpoint, full.checkpoint]);
    catalog.sweep(JOB, &other.checkpoint).await.unwrap();
    assert_eq!(catalog.names(JOB).await.unwrap(), [other.checkpoint]);
    assert!(matches!(catalog.latest("nobody").await, Err(Error::Missing(_))));
}
