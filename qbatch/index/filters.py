"""``--filter``: a small expression over kept columns, parsed here and evaluated by Arrow.

lang == "en" and year >= 2020 and source not in ["spam", "test"]
"""

import ast
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qbatch.errors import ConfigError

_COMPARISONS: dict[type[ast.cmpop], Callable[[pc.Expression, Any], pc.Expression]] = {
    ast.Eq: lambda column, value: column == value,
    ast.NotEq: lambda column, value: column != value,
    ast.Lt: lambda column, value: column < value,
    ast.LtE: lambda column, value: column <= value,
    ast.Gt: lambda column, value: column > value,
    ast.GtE: lambda column, value: column >= value,
    ast.In: lambda column, value: column.isin(value),
    ast.NotIn: lambda column, value: ~column.isin(value),
}


def parse_filter(text: str) -> pc.Expression:
    """Return the Arrow expression of a filter.

    Raises:
        ConfigError: It is not comparisons of columns with constants, joined by and, or, not.
    """
    try:
        return _expression(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"cannot read --filter={text!r}: {error}. Compare kept columns with constants, as in "
            'lang == "en" and year >= 2020 and source in ["a", "b"]'
        ) from error


def filter_columns(text: str) -> list[str]:
    """Return the columns a filter looks at, sorted."""
    parse_filter(text)
    return sorted({node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)})


def matching_rows(table: pa.Table, expression: pc.Expression) -> np.ndarray:
    """Return which rows of a table match: bool, (rows,); null does not match.

    Raises:
        ConfigError: A column is missing, or its type does not compare with the constant.
    """
    try:
        columns = {name: table[name] for name in table.column_names}
        mask = pa.table({**columns, "": pa.array(np.arange(len(table)))}).filter(expression)[""]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, KeyError) as error:
        raise ConfigError(
            f"--filter does not fit the kept columns {table.schema.names}: {error}. Keep the "
            "column with --keep-columns when embedding, and compare it with its own type"
        ) from error
    matches = np.zeros(len(table), bool)
    matches[mask.to_numpy()] = True
    return matches


def _expression(node: ast.expr) -> pc.Expression:
    if isinstance(node, ast.BoolOp):
        parts = [_expression(value) for value in node.values]
        joined = parts[0]
        for part in parts[1:]:
            joined = joined & part if isinstance(node.op, ast.And) else joined | part
        return joined
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return ~_expression(node.operand)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.left, ast.Name):
        compare = _COMPARISONS.get(type(node.ops[0]))
        if compare is not None:
            return compare(pc.field(node.left.id), ast.literal_eval(node.comparators[0]))
    raise ValueError(f"{ast.unparse(node)!r} is not a comparison of a column with a constant")
