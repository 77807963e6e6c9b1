//! One sequence of changes in every form it may come in: what is there in the end must be the same.

use npm_policy::world::Change;

/// Batches of changes, with the name of the form.
pub type Form = (&'static str, Vec<Vec<Change>>);

/// The forms of a sequence whose world in the end is that of the sequence itself, which is the first.
pub fn forms(changes: &[Change]) -> Vec<Form> {
    let single = |changes: &[Change]| changes.iter().map(|change| vec![change.clone()]).collect::<Vec<_>>();
    // The last change of each object is all that counts.
    let mut last: Vec<Change> = Vec::new();
    for change in changes {
        last.retain(|earlier| gone(earlier) != gone(change));
        last.push(change.clone());
    }
    last.reverse();
    let kinds =
        (0..3).map(|wanted| changes.iter().filter(|change| kind(change) == wanted).cloned().collect());
    let pairs = changes.iter().map(|change| vec![gone(change), change.clone()]);
    let between = changes.iter().flat_map(|change| [vec![gone(change)], vec![change.clone()], vec![]]);
    let whole = changes.to_vec();
    vec![
        ("one by one", single(changes)),
        ("reversed", single(&last)),
        ("squashed", vec![whole.clone()]),
        ("split by kind", kinds.collect()),
        ("gone and there again at once", pairs.collect()),
        ("with empties between", between.collect()),
        ("everything twice", changes.iter().map(|change| vec![change.clone(), change.clone()]).collect()),
        ("emptied and filled again", vec![whole.clone(), whole.iter().map(gone).collect(), whole]),
    ]
}

/// The end of the object that a change is about.
pub fn gone(change: &Change) -> Change {
    match change {
        Change::Pod(key, _) => Change::Pod(key.clone(), None),
        Change::Namespace(name, _) => Change::Namespace(name.clone(), None),
        Change::Policy(key, _) => Change::Policy(key.clone(), None),
    }
}

fn kind(change: &Change) -> usize {
    match change {
        Change::Policy(..) => 0,
        Change::Namespace(..) => 1,
        Change::Pod(..) => 2,
    }
}
