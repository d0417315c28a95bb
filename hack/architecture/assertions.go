// SPDX-License-Identifier: Apache-2.0

package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"path/filepath"
	"slices"
)

// capabilityAssertions lists the types by which the files of a package find out
// what a value can do: interfaces, and types of the contract or of a mode.
func capabilityAssertions(dir string, files []string) ([]string, error) {
	var parsed []*ast.File
	interfaces := map[string]bool{}
	for _, name := range files {
		f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(dir, name), nil, parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		parsed = append(parsed, f)
		ast.Inspect(f, func(n ast.Node) bool {
			if spec, ok := n.(*ast.TypeSpec); ok && isInterface(spec.Type) {
				interfaces[spec.Name.Name] = true
			}
			return true
		})
	}
	var out []string
	for _, f := range parsed {
		for _, asserted := range assertedTypes(f) {
			if revealsCapability(asserted, interfaces) {
				out = append(out, types.ExprString(asserted))
			}
		}
	}
	return out, nil
}

// assertedTypes are the types of a file's type assertions and type switches.
func assertedTypes(f *ast.File) []ast.Expr {
	var out []ast.Expr
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.TypeAssertExpr:
			if n.Type != nil { // nil in the head of a type switch
				out = append(out, n.Type)
			}
		case *ast.TypeSwitchStmt:
			for _, clause := range n.Body.List {
				out = append(out, clause.(*ast.CaseClause).List...)
			}
		}
		return true
	})
	return out
}

func isInterface(t ast.Expr) bool {
	_, ok := t.(*ast.InterfaceType)
	return ok
}

func revealsCapability(asserted ast.Expr, interfaces map[string]bool) bool {
	if pointer, ok := asserted.(*ast.StarExpr); ok {
		asserted = pointer.X
	}
	switch t := asserted.(type) {
	case *ast.InterfaceType:
		return true
	case *ast.Ident:
		return interfaces[t.Name]
	case *ast.SelectorExpr:
		from, ok := t.X.(*ast.Ident)
		return ok && (from.Name == contract || slices.Contains(modes, from.Name))
	}
	return false
}
