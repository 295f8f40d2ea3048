//! What a template's source may look like, checked before the engine compiles it: the engine
//! recurses over expressions and computes constants while it compiles, and a hostile source would
//! take the stack or the memory away.

use minijinja::machinery::ast::{BinOpKind, CallArg, Expr, Stmt, UnaryOpKind};
use minijinja::machinery::{Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind};

/// Bytes of a template's source. The longest in use have some 30 KB.
pub(super) const MAX_SOURCE_BYTES: usize = 256 << 10;
/// Operators, calls and the like in one tag: each may be a level of the expression.
const MAX_OPERATORS: usize = 400;
/// Brackets within brackets.
const MAX_BRACKETS: usize = 48;
/// Tags within tags; each `elif` counts as one.
const MAX_NESTING: usize = 96;
/// Bytes of a constant that the engine would compute while it compiles.
const MAX_CONSTANT: f64 = (1u32 << 20) as f64;

fn refuse(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::SyntaxError, what.into())
}

/// Checks nesting and length by tokens, without recursion.
pub(super) fn check_source(source: &str, syntax: &SyntaxConfig) -> Result<(), Error> {
    if source.len() > MAX_SOURCE_BYTES {
        let length = source.len();
        return Err(refuse(format!("it has {length} bytes, more than {MAX_SOURCE_BYTES}")));
    }
    // Per open tag: how deep its branches go.
    let mut open: Vec<usize> = Vec::new();
    let mut tag = Tag::default();
    for token in tokenize(source, false, syntax.clone()) {
        let (token, _) = token?;
        match token {
            Token::BlockStart | Token::VariableStart => tag = Tag::default(),
            Token::BlockEnd => tag.close(&mut open)?,
            Token::Ident(word) if tag.word.is_none() => tag.word = Some(word),
            Token::Ident("and" | "or" | "not" | "is" | "in" | "if" | "else") => tag.operator()?,
            Token::Assign => tag.assigns = true,
            Token::BracketOpen | Token::ParenOpen | Token::BraceOpen => {
                tag.brackets += 1;
                if tag.brackets > MAX_BRACKETS {
                    return Err(refuse(format!("brackets are more than {MAX_BRACKETS} deep")));
                }
                tag.operator()?;
            }
            Token::BracketClose | Token::ParenClose | Token::BraceClose => {
                tag.brackets = tag.brackets.saturating_sub(1);
            }
            Token::TemplateData(_)
            | Token::VariableEnd
            | Token::Ident(_)
            | Token::Str(_)
            | Token::String(_)
            | Token::Int(_)
            | Token::Int128(_)
            | Token::Float(_)
            | Token::Comma
            | Token::Colon => {}
            _ => tag.operator()?,
        }
    }
    Ok(())
}

/// What is known of a tag while its tokens go by.
#[derive(Default)]
struct Tag<'a> {
    word: Option<&'a str>,
    assigns: bool,
    operators: usize,
    brackets: usize,
}

impl Tag<'_> {
    fn operator(&mut self) -> Result<(), Error> {
        self.operators += 1;
        if self.operators > MAX_OPERATORS {
            return Err(refuse(format!("one tag has more than {MAX_OPERATORS} operators")));
        }
        Ok(())
    }

    fn close(&self, open: &mut Vec<usize>) -> Result<(), Error> {
        match self.word.unwrap_or("") {
            "for" | "if" | "with" | "filter" | "macro" | "call" | "block" | "autoescape" => {
                open.push(1);
            }
            "set" if !self.assigns => open.push(1),
            "elif" | "else" => {
                if let Some(branches) = open.last_mut() {
                    *branches += 1;
                }
            }
            word if word.starts_with("end") => drop(open.pop()),
            _ => {}
        }
        if open.iter().sum::<usize>() > MAX_NESTING {
            return Err(refuse(format!("tags are more than {MAX_NESTING} deep")));
        }
        Ok(())
    }
}

/// What is known of a constant without computing it: an upper bound of its size, if it is a text
/// or a list in bytes, if it is a number in magnitude.
#[derive(Clone, Copy)]
struct Constant {
    bytes: f64,
    magnitude: f64,
}

/// Checks that the engine's folding of constants stays small.
pub(super) fn check_constants(statement: &Stmt<'_>) -> Result<(), Error> {
    let check = |expressions: &[&Expr<'_>]| -> Result<(), Error> {
        expressions.iter().try_for_each(|expression| fold(expression).map(drop))
    };
    let body = |body: &[Stmt<'_>]| body.iter().try_for_each(check_constants);
    match statement {
        Stmt::Template(node) => body(&node.children),
        Stmt::EmitExpr(node) => check(&[&node.expr]),
        Stmt::EmitRaw(_) | Stmt::Continue(_) | Stmt::Break(_) => Ok(()),
        Stmt::ForLoop(node) => {
            check(&[&node.iter])?;
            node.filter_expr.iter().try_for_each(|filter| check(&[filter]))?;
            body(&node.body)?;
            body(&node.else_body)
        }
        Stmt::IfCond(node) => {
            check(&[&node.expr])?;
            body(&node.true_body)?;
            body(&node.false_body)
        }
        Stmt::WithBlock(node) => {
            node.assignments.iter().try_for_each(|(_, value)| check(&[value]))?;
            body(&node.body)
        }
        Stmt::Set(node) => check(&[&node.expr]),
        Stmt::SetBlock(node) => {
            node.filter.iter().try_for_each(|filter| check(&[filter]))?;
            body(&node.body)
        }
        Stmt::AutoEscape(node) => {
            check(&[&node.enabled])?;
            body(&node.body)
        }
        Stmt::FilterBlock(node) => {
            check(&[&node.filter])?;
            body(&node.body)
        }
        Stmt::Block(node) => body(&node.body),
        Stmt::Macro(node) => {
            node.defaults.iter().try_for_each(|value| check(&[value]))?;
            body(&node.body)
        }
        Stmt::CallBlock(node) => {
            arguments(&node.call.args)?;
            check(&[&node.call.expr])?;
            body(&node.macro_decl.body)
        }
        Stmt::Do(node) => {
            arguments(&node.call.args)?;
            check(&[&node.call.expr])
        }
        Stmt::Import(_) | Stmt::FromImport(_) | Stmt::Extends(_) | Stmt::Include(_) => {
            Err(refuse("a chat template cannot use other templates"))
        }
    }
}

fn arguments(arguments: &[CallArg<'_>]) -> Result<(), Error> {
    arguments.iter().try_for_each(|argument| match argument {
        CallArg::Pos(value) | CallArg::Kwarg(_, value) => fold(value).map(drop),
        CallArg::PosSplat(_) | CallArg::KwargSplat(_) => {
            Err(refuse("a chat template cannot spread arguments"))
        }
    })
}

/// The bound of an expression, `None` if it is not constant. Checks all parts on the way.
fn fold(expression: &Expr<'_>) -> Result<Option<Constant>, Error> {
    let all = |expressions: &mut dyn Iterator<Item = &Expr<'_>>| -> Result<_, Error> {
        let mut sum = Some(Constant { bytes: 0.0, magnitude: 0.0 });
        for expression in expressions {
            let part = fold(expression)?;
            sum = sum.zip(part).map(|(sum, part)| Constant {
                bytes: sum.bytes + part.bytes + 32.0,
                magnitude: 0.0,
            });
        }
        Ok(sum)
    };
    match expression {
        Expr::Const(node) => {
            let value = &node.value;
            let bytes = value.as_str().map_or(0, str::len) as f64;
            let number = value.kind() == ValueKind::Number;
            let magnitude = f64::try_from(value.clone()).unwrap_or(f64::MAX).abs();
            Ok(Some(Constant { bytes, magnitude: if number { magnitude } else { 0.0 } }))
        }
        Expr::List(node) => all(&mut node.items.iter()),
        Expr::Tuple(node) => all(&mut node.items.iter()),
        Expr::Map(node) => all(&mut node.keys.iter().chain(&node.values)),
        Expr::UnaryOp(node) => {
            let inner = fold(&node.expr)?;
            Ok(match node.op {
                UnaryOpKind::Not => inner.map(|_| Constant { bytes: 0.0, magnitude: 1.0 }),
                UnaryOpKind::Neg => inner,
            })
        }
        Expr::BinOp(node) => {
            let (left, right) = (fold(&node.left)?, fold(&node.right)?);
            let Some((left, right)) = left.zip(right) else { return Ok(None) };
            binary(&node.op, left, right).map(Some)
        }
        Expr::Compare(node) => {
            let first = fold(&node.expr)?;
            let rest = all(&mut node.ops.iter().map(|op| &op.expr))?;
            Ok(first.zip(rest).map(|_| Constant { bytes: 0.0, magnitude: 1.0 }))
        }
        Expr::Var(_) => Ok(None),
        Expr::Slice(node) => {
            fold(&node.expr)?;
            let parts = [&node.start, &node.stop, &node.step];
            all(&mut parts.into_iter().flatten()).map(|_| None)
        }
        Expr::IfExpr(node) => {
            fold(&node.test_expr)?;
            all(&mut std::iter::once(&node.true_expr).chain(&node.false_expr)).map(|_| None)
        }
        Expr::Filter(node) => {
            arguments(&node.args)?;
            all(&mut node.expr.iter()).map(|_| None)
        }
        Expr::Test(node) => {
            arguments(&node.args)?;
            fold(&node.expr).map(|_| None)
        }
        Expr::GetAttr(node) => fold(&node.expr).map(|_| None),
        Expr::GetItem(node) => {
            fold(&node.subscript_expr)?;
            fold(&node.expr).map(|_| None)
        }
        Expr::Call(node) => {
            arguments(&node.args)?;
            fold(&node.expr).map(|_| None)
        }
    }
}

fn binary(operator: &BinOpKind, left: Constant, right: Constant) -> Result<Constant, Error> {
    let sum = left.bytes + right.bytes;
    let (bytes, magnitude) = match operator {
        BinOpKind::Add | BinOpKind::Sub => (sum, left.magnitude + right.magnitude),
        BinOpKind::Mul => (
            left.bytes * right.magnitude + right.bytes * left.magnitude,
            left.magnitude * right.magnitude,
        ),
        BinOpKind::Pow => (0.0, left.magnitude.max(2.0).powf(right.magnitude.max(1.0))),
        // Dividing by less than one makes numbers larger.
        BinOpKind::Div | BinOpKind::FloorDiv | BinOpKind::Rem => (0.0, f64::MAX),
        BinOpKind::Concat => (sum + 96.0, 0.0),
        BinOpKind::ScAnd | BinOpKind::ScOr => {
            (left.bytes.max(right.bytes), left.magnitude.max(right.magnitude))
        }
        _ => (0.0, 1.0),
    };
    if bytes.is_nan() || bytes > MAX_CONSTANT {
        return Err(refuse("a constant in it is too large"));
    }
    Ok(Constant { bytes, magnitude })
}
