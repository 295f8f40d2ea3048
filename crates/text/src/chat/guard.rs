//! Puts the budget into a compiled template. Fuel counts instructions, but one instruction can
//! double a text or compare two long ones; so around each that can, calls are inserted that pay
//! for it first and look at the result afterwards.
//!
//! This uses the engine's `machinery`, which promises no stability: its version is pinned in the
//! workspace, and the tests in `chat/tests.rs` hold it to what is needed.

use minijinja::machinery::{Instruction, Instructions};
use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Environment, Error, State};

use super::budget::{Budget, MAX_NODES, exhausted};
use super::values::{self, Bounded};

// No template can say these names.
const TOUCH: &str = "+touch";
const WEIGH: &str = "+weigh";
const COMPARE: &str = "+compare";
const CALL: &str = "+call";
const MULTIPLY: &str = "+multiply";
const CONCAT: &str = "+concat";
const SETTLE: &str = "+settle";
const ITERATE: &str = "+iterate";
const STORE: &str = "+store";
const SORT: &str = "+sort";
const SELECT: &str = "+select";

/// Tests that look at no more than a value's type.
const CHEAP_TESTS: &[&str] = &[
    "defined",
    "undefined",
    "none",
    "string",
    "mapping",
    "iterable",
    "sequence",
    "number",
    "integer",
    "float",
    "boolean",
    "true",
    "false",
    "callable",
];

/// Adds the functions that [`guarded`] calls.
pub(super) fn add_functions(env: &mut Environment<'_>) {
    env.add_function(TOUCH, |state: &mut State, args: Rest<Value>, named: Kwargs| {
        let args = arguments(args, named);
        for value in args.iter() {
            Budget::of(state).touch(value)?;
        }
        Ok(handed_back(args))
    });
    env.add_function(WEIGH, |state: &mut State, args: Rest<Value>, named: Kwargs| {
        let args = arguments(args, named);
        for value in args.iter() {
            Budget::of(state).weigh(value)?;
        }
        Ok(handed_back(args))
    });
    env.add_function(CALL, |state: &mut State, args: Rest<Value>, named: Kwargs| {
        let args = arguments(args, named);
        let (first, rest) = args.split_first().unzip();
        // A method may go through a text letter by letter.
        let letters = first.and_then(|value| Some(value.as_str()?.len())).unwrap_or(0);
        Budget::of(state).work(letters as u64 / 4 + 1)?;
        for value in rest.unwrap_or_default() {
            Budget::of(state).weigh(value)?;
        }
        Ok(handed_back(args))
    });
    // Each item is compared some log2(n) times.
    env.add_function(SORT, |state: &mut State, args: Rest<Value>, named: Kwargs| {
        let args = arguments(args, named);
        let weight =
            args.iter().map(|value| Budget::of(state).weigh(value)).sum::<Result<u64, _>>()?;
        Budget::of(state).work(weight.saturating_mul(16))?;
        Ok(handed_back(args))
    });
    // Each item is handled together with all the other arguments.
    env.add_function(SELECT, |state: &mut State, args: Rest<Value>, named: Kwargs| {
        let args = arguments(args, named);
        let mut product = 1u64;
        for value in args.iter() {
            product = product.saturating_mul(Budget::of(state).weigh(value)?);
        }
        Budget::of(state).work(product)?;
        Ok(handed_back(args))
    });
    env.add_function(COMPARE, compare);
    env.add_function(MULTIPLY, multiply);
    env.add_function(CONCAT, concat);
    env.add_function(SETTLE, |state: &mut State, value: Value| Budget::of(state).settle(value));
    env.add_function(ITERATE, iterate);
    env.add_function(STORE, store);
}

/// The arguments as they were on the stack: those with names are the last value, if there are any.
fn arguments(args: Rest<Value>, named: Kwargs) -> Vec<Value> {
    let mut args = args.0;
    if named.args().next().is_some() {
        args.push(named.into());
    }
    args
}

/// The arguments as a list that `UnpackList` puts back where they were.
fn handed_back(mut args: Vec<Value>) -> Value {
    args.reverse();
    Value::from(args)
}

fn has_items(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map)
}

/// Comparing goes as deep as both sides do; looking for something in a list, as deep as the list.
fn compare(state: &mut State, args: Rest<Value>) -> Result<Value, Error> {
    let deep =
        args.iter().any(|value| matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable))
            || args.iter().all(has_items);
    for value in args.iter() {
        if deep {
            Budget::of(state).weigh(value)?;
        } else {
            Budget::of(state).touch(value)?;
        }
    }
    Ok(handed_back(args.0))
}

/// `text * n` and `list * n` are paid for by the length of the result.
fn multiply(state: &mut State, args: Rest<Value>) -> Result<Value, Error> {
    let times = |value: &Value| u64::try_from(value.clone()).unwrap_or(0);
    if let [left, right] = args.as_slice() {
        for (value, other) in [(left, right), (right, left)] {
            if let Some(text) = value.as_str() {
                let length = (text.len() as u64).saturating_mul(times(other));
                Budget::of(state).make(usize::try_from(length).unwrap_or(usize::MAX))?;
            } else if has_items(value) {
                let weight = Budget::of(state).weigh(value)?;
                if weight.saturating_mul(times(other)) > MAX_NODES {
                    return Err(exhausted(format!("it repeats a list to over {MAX_NODES} values")));
                }
            }
        }
    }
    Ok(handed_back(args.0))
}

/// `left ~ right`.
fn concat(state: &mut State, left: Value, right: Value) -> Result<Value, Error> {
    let budget = Budget::of(state);
    let mut text = Bounded::new(super::budget::MAX_STRING_BYTES);
    for side in [&left, &right] {
        budget.weigh(side)?;
        values::write_str(side, &mut text)
            .map_err(|_| exhausted("it joins texts to one that is too long"))?;
    }
    let text = text.into_text();
    budget.make(text.len())?;
    Ok(Value::from(text))
}

/// A text in a loop becomes a list of its characters.
fn iterate(state: &mut State, value: Value) -> Result<Value, Error> {
    let letters = value.as_str().map_or(0, str::len) as u64;
    if letters > MAX_NODES {
        return Err(exhausted(format!("it goes through a text of {letters} bytes")));
    }
    Budget::of(state).work(letters)?;
    if value.kind() == ValueKind::Iterable { Budget::of(state).settle(value) } else { Ok(value) }
}

/// A namespace in a namespace could hold itself, and never end.
fn store(state: &mut State, value: Value) -> Result<Value, Error> {
    if holds_namespace(&value) {
        return Err(exhausted("it puts a namespace into a namespace"));
    }
    Budget::of(state).weigh(&value)?;
    Ok(value)
}

/// The weight of `value` is within limits: everything that makes values settles them.
fn holds_namespace(value: &Value) -> bool {
    if value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace")) {
        return true;
    }
    has_items(value)
        && values::items(value).any(|item| {
            holds_namespace(&item)
                || (value.kind() == ValueKind::Map
                    && value.get_item(&item).is_ok_and(|item| holds_namespace(&item)))
        })
}

/// What is inserted before and after an instruction.
#[derive(Default)]
struct Around {
    /// A function that gets the topmost values and gives them back.
    before: Option<(&'static str, usize)>,
    /// A function that takes the topmost value and gives another one for it.
    replace_top: Option<&'static str>,
    settle: bool,
}

fn around(instruction: &Instruction<'_>) -> Around {
    let before = |name, count| Around { before: Some((name, count)), ..Around::default() };
    let both =
        |name, count| Around { before: Some((name, count)), settle: true, replace_top: None };
    let settle = || Around { settle: true, ..Around::default() };
    match instruction {
        Instruction::Eq
        | Instruction::Ne
        | Instruction::Gt
        | Instruction::Gte
        | Instruction::Lt
        | Instruction::Lte
        | Instruction::In
        | Instruction::CompareAndPreserve(_) => before(COMPARE, 2),
        Instruction::GetItem => before(TOUCH, 2),
        Instruction::Slice => both(TOUCH, 4),
        Instruction::Add => both(TOUCH, 2),
        Instruction::Mul => both(MULTIPLY, 2),
        Instruction::PerformTest(name, Some(count), _) if !CHEAP_TESTS.contains(name) => {
            before(WEIGH, usize::from(*count))
        }
        Instruction::ApplyFilter(
            "sort" | "unique" | "min" | "max" | "dictsort",
            Some(count),
            _,
        ) => both(SORT, usize::from(*count)),
        Instruction::ApplyFilter(
            "select" | "reject" | "selectattr" | "rejectattr" | "map",
            Some(count),
            _,
        ) => both(SELECT, usize::from(*count)),
        Instruction::ApplyFilter(_, Some(count), _) | Instruction::CallMethod(_, Some(count)) => {
            both(CALL, usize::from(*count))
        }
        Instruction::CallFunction("loop", Some(1)) => {
            Around { replace_top: Some(ITERATE), settle: true, before: None }
        }
        Instruction::PushLoop(_) | Instruction::FastRecurse => {
            Around { replace_top: Some(ITERATE), ..Around::default() }
        }
        Instruction::CallFunction(..)
        | Instruction::CallObject(_)
        | Instruction::BuildList(_)
        | Instruction::BuildTuple(_)
        | Instruction::BuildMap(_)
        | Instruction::EndCapture => settle(),
        _ => Around::default(),
    }
}

/// The same program with the budget's calls in it.
pub(super) fn guarded<'source>(old: &Instructions<'source>) -> Instructions<'source> {
    let mut new = Instructions::new(old.name(), old.source());
    let mut moved = Vec::new();
    let mut at = 0;
    while let Some(instruction) = old.get(at) {
        moved.push(rewrite(old, at, instruction, &mut new));
        at += 1;
    }
    moved.push(new.add(Instruction::LoadConst(Value::UNDEFINED)));
    let mut at = 0;
    while let Some(instruction) = new.get_mut(at) {
        match instruction {
            Instruction::Iterate(target)
            | Instruction::Jump(target)
            | Instruction::JumpIfFalse(target)
            | Instruction::JumpIfFalseOrPop(target)
            | Instruction::JumpIfTrueOrPop(target)
            | Instruction::BuildMacro(_, target, _) => {
                *target = moved.get(*target as usize).copied().unwrap_or(u32::MAX);
            }
            _ => {}
        }
        at += 1;
    }
    new
}

/// Appends one instruction and what goes around it; where it begins now.
fn rewrite<'source>(
    old: &Instructions<'source>,
    at: u32,
    instruction: &Instruction<'source>,
    new: &mut Instructions<'source>,
) -> u32 {
    let mut added = Vec::with_capacity(6);
    let around = around(instruction);
    if let Some((name, count)) = around.before {
        added.push(Instruction::CallFunction(name, Some(count as u16)));
        added.push(Instruction::UnpackList(count));
    }
    if let Some(name) = around.replace_top {
        added.push(Instruction::CallFunction(name, Some(1)));
    }
    match instruction {
        // Text of the template itself goes the way of other text, through the formatter.
        Instruction::EmitRaw(text) => {
            added.push(Instruction::LoadConst(Value::from(*text)));
            added.push(Instruction::Emit);
        }
        Instruction::StringConcat => added.push(Instruction::CallFunction(CONCAT, Some(2))),
        Instruction::SetAttr(name) => {
            added.push(Instruction::Swap);
            added.push(Instruction::CallFunction(STORE, Some(1)));
            added.push(Instruction::Swap);
            added.push(Instruction::SetAttr(name));
        }
        other => added.push(other.clone()),
    }
    if around.settle {
        added.push(Instruction::CallFunction(SETTLE, Some(1)));
    }
    let mut start = None;
    for instruction in added {
        let place = match old.get_span(at) {
            Some(span) => new.add_with_span(instruction, span),
            None => match old.get_line(at) {
                Some(line) => {
                    new.add_with_line(instruction, u16::try_from(line).unwrap_or(u16::MAX))
                }
                None => new.add(instruction),
            },
        };
        start.get_or_insert(place);
    }
    start.unwrap_or_default()
}
