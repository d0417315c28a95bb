// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"crypto/sha256"
	"fmt"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
)

// Chain is one chain with its rules.
type Chain struct {
	Name  string
	Hook  *Hook // nil for a chain that is only jumped to
	Rules []Rule
}

// Hook binds a base chain to a hook of the kernel.
type Hook struct {
	kind     nftables.ChainType
	num      *nftables.ChainHook
	priority nftables.ChainPriority
	text     string // as nft writes it
}

// Statement is one part of a rule: the kernel's expressions, and the text in which nft
// lists them. A test compares the text with what nft makes of the expressions.
type Statement struct {
	text  string
	exprs []expr.Any
}

// Rule is a list of statements. A packet that does not match one leaves the rule.
type Rule struct {
	statements []Statement
	comment    string
}

// NewRule makes a rule of statements, which are evaluated in order.
func NewRule(s ...Statement) Rule { return Rule{statements: s} }

// Comment returns the rule with a comment.
func (r Rule) Comment(comment string) Rule {
	r.comment = comment
	return r
}

// text is the rule as `nft list` writes it.
func (r Rule) text() string {
	parts := make([]string, 0, len(r.statements)+1)
	for _, s := range r.statements {
		parts = append(parts, s.text)
	}
	if r.comment != "" {
		parts = append(parts, fmt.Sprintf("comment %q", r.comment))
	}
	return strings.Join(parts, " ")
}

func (r Rule) exprs() []expr.Any {
	var list []expr.Any
	for _, s := range r.statements {
		list = append(list, s.exprs...)
	}
	return list
}

// digestType is the type of a rule's digest in its user data. nft skips types that it does
// not know.
const digestType userdata.Type = 'S'

// userData is what the kernel keeps for a rule without reading it: the comment for nft, and
// a digest of the expressions. Nobody can change a rule, only replace it by another one. So a
// rule with the digest says what signalbox wrote.
func (r Rule) userData(f nftables.TableFamily) (data []byte, err error) {
	if r.comment != "" {
		data = userdata.AppendString(data, userdata.TypeComment, r.comment)
	}
	h := sha256.New()
	for _, e := range r.exprs() {
		text, err := expr.Marshal(byte(f), e)
		if err != nil {
			return nil, fmt.Errorf("digest of the rule %s: %w", r.text(), err)
		}
		h.Write(text)
	}
	return userdata.Append(data, digestType, h.Sum(nil)[:8]), nil
}

// NewHook makes a hook for filter chains. The text is what nft lists for it.
func NewHook(num *nftables.ChainHook, priority nftables.ChainPriority, text string) *Hook {
	return &Hook{nftables.ChainTypeFilter, num, priority, text}
}

// NewNATHook makes a hook for chains that rewrite addresses.
func NewNATHook(num *nftables.ChainHook, priority nftables.ChainPriority, text string) *Hook {
	return &Hook{nftables.ChainTypeNAT, num, priority, text}
}

// NewChain makes a chain. Without a hook it is only jumped to.
func NewChain(name string, hook *Hook, rules ...Rule) Chain {
	return Chain{Name: name, Hook: hook, Rules: rules}
}
