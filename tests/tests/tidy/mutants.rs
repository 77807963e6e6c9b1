//! The list of mutants must not rot: what a mutant replaces stands in its file exactly once.

use serde::Deserialize;

#[derive(Deserialize)]
struct Mutant {
    name: String,
    file: String,
    find: String,
    replace: String,
}

/// Mutants whose place is gone or is not the only one, that change nothing, or that share a name.
pub(crate) fn misplaced(list: &str, read: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let mutants: Vec<Mutant> = match serde_saphyr::from_str(list) {
        Ok(mutants) => mutants,
        Err(error) => return vec![format!("the list of mutants: {error}")],
    };
    let mut complaints = Vec::new();
    for (index, mutant) in mutants.iter().enumerate() {
        let name = &mutant.name;
        match read(&mutant.file).map(|text| text.matches(&mutant.find).count()) {
            Some(1) => {}
            Some(places) => {
                complaints.push(format!("{name}: `{}` stands {places} times in {}", mutant.find, mutant.file))
            }
            None => complaints.push(format!("{name}: there is no {}", mutant.file)),
        }
        if mutant.find == mutant.replace {
            complaints.push(format!("{name}: changes nothing"));
        }
        if mutants[..index].iter().any(|other| other.name == *name) {
            complaints.push(format!("{name}: stands twice in the list"));
        }
    }
    if mutants.len() < 30 {
        complaints.push(format!("only {} mutants", mutants.len()));
    }
    complaints
}

#[test]
fn a_rotten_list_is_seen() {
    let mutant =
        |name: &str, find: &str| format!("- {{name: {name}, file: a.rs, find: {find}, replace: x}}\n");
    let list: String = (0..30).map(|index| mutant(&format!("m{index}"), "once")).collect();
    let read = |name: &str| (name == "a.rs").then(|| "once twice twice x".to_owned());
    assert_eq!(misplaced(&list, read), Vec::<String>::new());
    for (addition, complaint) in [
        (mutant("more", "never"), "stands 0 times"),
        (mutant("more", "twice"), "stands 2 times"),
        (mutant("more", "x"), "changes nothing"),
        (mutant("m3", "once"), "stands twice in the list"),
        (mutant("more", "once").replace("a.rs", "b.rs"), "there is no b.rs"),
    ] {
        let complaints = misplaced(&format!("{list}{addition}"), read);
        assert!(complaints.len() == 1 && complaints[0].contains(complaint), "{complaints:?}");
    }
    assert!(misplaced(&mutant("only", "once"), read)[0].contains("only 1 mutants"));
}
