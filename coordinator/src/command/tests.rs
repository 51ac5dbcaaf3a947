use super::*;
use proptest::prelude::*;

#[test]
fn a_command_out_of_bounds_is_refused_by_field_and_never_logged() {
    let register = |name: &str, address: &str, id: &str| {
        let (name, address, request_id) = (name.into(), address.into(), id.into());
        let zone = String::new();
        let rest = v1::RegisterServerRequest::default();
        let request = v1::RegisterServerRequest { name, address, zone, request_id, ..rest };
        Body::RegisterServer(request)
    };
    assert!(register("ps-0", "127.0.0.1:1", "a").to_log(0).is_ok());
    let field = |body: Body| body.to_log(0).unwrap_err().field;
    let mut lengthy = register("ps-0", "127.0.0.1:1", "a");
    if let Body::RegisterServer(request) = &mut lengthy {
        request.origin = "x".repeat(TEXT_BYTES_MAX + 1);
    }
    assert_eq!(field(lengthy), "origin");
    assert_eq!(field(register("", "127.0.0.1:1", "a")), "name");
    assert_eq!(field(register("ps-0", "127.0.0.1", "a")), "address");
    assert_eq!(field(register("ps-0", ":1", "a")), "address");
    assert_eq!(field(register("ps-0", "127.0.0.1:1", "")), "request_id");
    assert_eq!(field(Body::DeleteJob(v1::DeleteJobRequest::default())), "job");
    let long = "x".repeat(LABEL_VALUE_BYTES_MAX + 1);
    let label = |value, expected| {
        let key = "k".into();
        Body::LabelJob(v1::LabelJobRequest { job: 1, key, value, expected })
    };
    assert_eq!(field(label(long, None)), "value");
    assert_eq!(field(label("v".into(), Some("x".repeat(COMMAND_BYTES_MAX)))), "request");
    let many = vec![v1::VariableSpec::default(); VARIABLES_MAX as usize + 1];
    let define = v1::DefineVariablesRequest { job: 1, session: 1, variables: many };
    assert_eq!(field(Body::DefineVariables(define)), "variables");
    let unspecified = v1::OpenSessionRequest { job: 1, ..Default::default() };
    assert_eq!(field(Body::OpenSession(unspecified)), "kind");
}

proptest! {
    #[test]
    fn any_bytes_decode_to_a_command_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        let _ = Command::decode(&bytes);
    }
}
