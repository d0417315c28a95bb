package file

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"unicode"

	yamlv3 "go.yaml.in/yaml/v3"
	strictjson "sigs.k8s.io/json"
)

// decode fills obj from text, the JSON of what is at a path of the document.
// Unknown fields, and names in the wrong case, are faults as they are to the
// API server.
func (d document) decode(text []byte, path string, obj object) (faults []fault) {
	strict, err := strictjson.UnmarshalStrict(text, obj)
	for _, e := range strict {
		var field strictjson.FieldError
		if !errors.As(e, &field) {
			faults = append(faults, fault{line: d.lineOfPath(path), reason: e.Error()})
			continue
		}
		faults = append(faults, fault{line: d.lineOfPath(join(path, field.FieldPath())), reason: e.Error()})
	}
	var wrongType *json.UnmarshalTypeError
	switch {
	case errors.As(err, &wrongType):
		at := join(path, pathAt(text, wrongType.Offset))
		reason := fmt.Sprintf("%s: a %s where a %s is wanted", at, wrongType.Value, wrongType.Type)
		faults = append(faults, fault{line: d.lineOfPath(at), reason: reason})
	case err != nil:
		faults = append(faults, fault{line: d.lineOfPath(path), reason: err.Error()})
	}
	return faults
}

// join puts a path below another: "items[0]" and "spec.ports" make
// "items[0].spec.ports".
func join(path, below string) string {
	if path == "" || below == "" || below[0] == '[' {
		return path + below
	}
	return path + "." + below
}

// pathAt names the value that ends at an offset of a JSON text.
func pathAt(text []byte, offset int64) string {
	type level struct {
		array bool
		key   string
		index int
		value bool // in an object: the next token is a value
	}
	var levels []level
	path := func() string {
		var s string
		for _, l := range levels {
			if l.array {
				s += fmt.Sprintf("[%d]", l.index)
			} else if l.key != "" {
				s = join(s, l.key)
			}
		}
		return s
	}
	decoder := json.NewDecoder(bytes.NewReader(text))
	for {
		token, err := decoder.Token()
		if err != nil {
			return path()
		}
		top := len(levels) - 1
		name, isName := token.(string)
		if top >= 0 && !levels[top].array && !levels[top].value && isName {
			levels[top].key, levels[top].value = name, true
			continue
		}
		if decoder.InputOffset() >= offset {
			return path()
		}
		switch token {
		case json.Delim('{'), json.Delim('['):
			levels = append(levels, level{array: token == json.Delim('[')})
			continue
		case json.Delim('}'), json.Delim(']'):
			levels = levels[:top]
			top--
		}
		if top >= 0 { // a value has ended
			levels[top].index++
			levels[top].value = false
		}
	}
}

// places is where everything in a document stands. It is looked for once, at
// the first fault: a document may have thousands.
type places struct {
	root   *yamlv3.Node
	looked bool
}

func (p *places) in(text []byte) *yamlv3.Node {
	if !p.looked {
		p.looked = true
		var whole yamlv3.Node
		if err := yamlv3.Unmarshal(text, &whole); err == nil && len(whole.Content) > 0 {
			p.root = whole.Content[0]
		}
	}
	return p.root
}

// lineOfPath finds the line of a field such as "spec.ports[1].port", or of the
// innermost thing around it that can be found.
func (d document) lineOfPath(path string) int {
	root := d.places.in(d.text)
	if root == nil {
		// JSON has a few forms that YAML has not.
		return d.lineOf(path[strings.LastIndex(path, ".")+1:])
	}
	// YAML has more ways to end a line than files have.
	return min(d.line+lineIn(root, path)-1, d.lastLine())
}

func lineIn(n *yamlv3.Node, path string) int {
	for n.Kind == yamlv3.AliasNode {
		n = n.Alias
	}
	line := n.Line
	switch n.Kind {
	case yamlv3.MappingNode:
		for i := 0; i+1 < len(n.Content); i += 2 {
			name := n.Content[i]
			rest, ok := strings.CutPrefix(path, name.Value)
			if !ok || rest != "" && rest[0] != '.' && rest[0] != '[' {
				continue
			}
			line = name.Line
			if rest != "" {
				line = lineIn(n.Content[i+1], strings.TrimPrefix(rest, "."))
			}
		}
	case yamlv3.SequenceNode:
		index, rest, ok := strings.Cut(strings.TrimPrefix(path, "["), "]")
		if i, err := strconv.Atoi(index); ok && err == nil && i >= 0 && i < len(n.Content) {
			line = n.Content[i].Line
			if rest != "" {
				line = lineIn(n.Content[i], strings.TrimPrefix(rest, "."))
			}
		}
	}
	return line
}

var (
	yamlLine = regexp.MustCompile(`line (\d+)`)
	// foundByGrammar are the errors of the YAML library's second stage, which
	// counts lines from zero where the first and the third count from one.
	foundByGrammar = regexp.MustCompile(`did not find expected (key|'-' indicator|',' or '[\]}]'|node content|<document start>)`)
	quotedAnchor   = regexp.MustCompile(`unknown anchor '([^']*)'`)
)

// yamlFault finds the line that a YAML error is about. The library counts from
// the document's start and names no line that is the first.
func (d document) yamlFault(err error) fault {
	reason := strings.TrimPrefix(err.Error(), "error converting YAML to JSON: ")
	shift, last := d.line-1, d.lastLine()
	if foundByGrammar.MatchString(reason) {
		shift++
	}
	line := 0
	reason = yamlLine.ReplaceAllStringFunc(reason, func(s string) string {
		n, _ := strconv.Atoi(s[len("line "):])
		n = min(n+shift, last)
		if line == 0 {
			line = n
		}
		return fmt.Sprintf("line %d", n)
	})
	if line != 0 {
		return fault{line: line, reason: reason}
	}
	if m := quotedAnchor.FindStringSubmatch(reason); m != nil {
		if i := bytes.Index(d.text, []byte("*"+m[1])); i >= 0 {
			return fault{line: d.lineAt(i), reason: reason}
		}
	}
	if i := bytes.IndexFunc(d.text, forbidden); i >= 0 && strings.Contains(reason, "control characters") {
		return fault{line: d.lineAt(i), reason: reason}
	}
	return fault{line: d.firstLine(), reason: reason}
}

// forbidden are the characters that YAML does not take even in a comment.
func forbidden(r rune) bool {
	return unicode.IsControl(r) && r != '\t' && r != '\n' && r != '\r' && r != 0x85 || r == 0xfffe || r == 0xffff
}

// firstLine is the first line with anything but space and comments in it.
func (d document) firstLine() int {
	line := d.line
	for text := range bytes.Lines(d.text) {
		if text = bytes.TrimSpace(text); len(text) > 0 && text[0] != '#' {
			return line
		}
		line++
	}
	return d.line
}

// lastLine is the last line with anything but space in it.
func (d document) lastLine() int { return d.lineAt(len(bytes.TrimRight(d.text, " \t\r\n"))) }

// lineOf finds the first line that has the field as a key, else the
// document's first.
func (d document) lineOf(field string) int {
	at := regexp.MustCompile(`(?m)(^|[\s{,"'-])` + regexp.QuoteMeta(field) + `["']?\s*:`).FindIndex(d.text)
	if at == nil {
		return d.firstLine()
	}
	return d.lineAt(at[1])
}

func (d document) lineAt(offset int) int { return d.line + bytes.Count(d.text[:offset], []byte("\n")) }
