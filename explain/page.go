// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"html/template"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"signalbox/internal/wait"
	"signalbox/proxier/plan"
	"signalbox/proxier/syncer"
)

// PagePath is where Page is served. Below it, each Service has a page of its own.
const PagePath = "/services"

const (
	// servicesOnPage is how many Services a page lists.
	servicesOnPage = 50
	// maxPorts and maxRows bound the page of one Service: its ports, and the lists of each.
	maxPorts, maxRows = 20, 200
	// pageShare bounds what pages cost: the Loop works at most one part in so many on them.
	pageShare = 20
	// rowsTime bounds for how long the Loop makes rows before it does something else.
	rowsTime = 5 * time.Millisecond
)

//go:embed page.html
var pageText string

var pageTemplate = template.Must(template.New("page").Funcs(template.FuncMap{"join": strings.Join}).Parse(pageText))

// Page answers GET requests from browsers: PagePath lists Services, and
// PagePath/NAMESPACE/NAME explains one.
func (d *Daemon) Page() http.Handler {
	mux := http.NewServeMux()
	pace := &pace{turn: make(chan struct{}, 1)}
	handle := func(pattern string, fill pageFiller) {
		mux.HandleFunc("GET "+pattern, func(w http.ResponseWriter, r *http.Request) { d.servePage(w, r, pace, fill) })
	}
	handle(PagePath, listPage)
	handle(PagePath+"/{namespace}/{name}", servicePage)
	return mux
}

// pageFiller fills a page. It has the Loop's goroutine do each part of the work with ask.
type pageFiller func(r *http.Request, s Subject, c *pageContent, ask func(func()) error) error

// pace makes one page after the other, with pauses.
type pace struct {
	turn chan struct{}
	next time.Time // of whoever has the turn
}

// make waits for the turn of a page and has fill make it.
func (p *pace) make(ctx context.Context, l *syncer.Loop, fill func(ask func(func()) error) error) error {
	select {
	case p.turn <- struct{}{}:
		defer func() { <-p.turn }()
	case <-ctx.Done():
		return fmt.Errorf("too many pages are asked for: %w", ctx.Err())
	}
	if !wait.For(ctx, time.Until(p.next)) {
		return fmt.Errorf("too many pages are asked for: %w", ctx.Err())
	}
	var worked time.Duration
	defer func() { p.next = time.Now().Add((pageShare - 1) * worked) }()
	return fill(func(part func()) error {
		return l.Ask(ctx, func() {
			began := time.Now()
			part()
			worked += time.Since(began)
		})
	})
}

// pageContent is what the template prints.
type pageContent struct {
	Status   *Status
	Code     int
	Question string // the search, or the name of the Service
	// List, or Answer.
	List   *serviceList
	Answer *Answer
	// Cut says that lists of Answer are longer.
	Cut bool
	// Error says why there is no answer.
	Error string
}

// serviceList is a part of the Services that a search finds.
type serviceList struct {
	Rows           []serviceRow
	First, Last    int // numbers of the rows, from 1
	Found          int
	Previous, Next string // URLs; empty for none
}

// serviceRow is a line of the list.
type serviceRow struct {
	Name      string
	Verdict   Verdict
	Problems  []string
	Frontends []string
	// Endpoints that get new connections, of All.
	Endpoints, All int
	// Reasons say why connections are not served.
	Reasons []string
}

func (d *Daemon) servePage(w http.ResponseWriter, r *http.Request, pace *pace, fill pageFiller) {
	s := d.current()
	var known loopStatus
	content := &pageContent{Code: http.StatusOK}
	ctx, cancel := context.WithTimeout(r.Context(), askTimeout)
	defer cancel()
	err := pace.make(ctx, s.Loop, func(ask func(func()) error) error {
		if err := ask(func() { known = s.loopStatus() }); err != nil {
			return err
		}
		if !s.Loop.Progress().Synced {
			return errors.New(notRead)
		}
		return fill(r, s, content, ask)
	})
	if err != nil {
		content = &pageContent{Question: content.Question, Code: http.StatusServiceUnavailable, Error: err.Error()}
	}
	content.Status = d.status(known)
	var page bytes.Buffer
	if err := pageTemplate.Execute(&page, content); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'")
	w.WriteHeader(content.Code)
	_, _ = page.WriteTo(w) // fails only if the client has gone
}

// listPage lists the Services that ?q= finds, from ?page= on.
func listPage(r *http.Request, s Subject, c *pageContent, ask func(func()) error) error {
	c.Question = strings.TrimSpace(r.FormValue("q"))
	var names []plan.ServiceName
	if err := ask(func() { names = find(s.Loop, c.Question) }); err != nil {
		return err
	}
	number, _ := strconv.Atoi(r.FormValue("page")) // 0 for none
	c.List, names = listOf(names, c.Question, number)
	for len(names) > 0 {
		err := ask(func() {
			for began := time.Now(); len(names) > 0 && time.Since(began) < rowsTime; names = names[1:] {
				c.List.Rows = append(c.List.Rows, s.row(names[0]))
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// listOf returns a page of the list without its rows, and the Services on it.
func listOf(names []plan.ServiceName, search string, number int) (*serviceList, []plan.ServiceName) {
	l := &serviceList{Found: len(names)}
	pages := max(1, (len(names)+servicesOnPage-1)/servicesOnPage)
	number = min(max(number, 1), pages)
	start := (number - 1) * servicesOnPage
	names = names[start:min(start+servicesOnPage, len(names))]
	l.First, l.Last = min(start+1, l.Found), start+len(names)
	at := func(n int) string {
		if n < 1 || n > pages {
			return ""
		}
		return PagePath + "?" + url.Values{"q": {search}, "page": {strconv.Itoa(n)}}.Encode()
	}
	l.Previous, l.Next = at(number-1), at(number+1)
	return l, names
}

// find returns the Services whose name has the text, or which have it as an address,
// sorted.
func find(l *syncer.Loop, text string) []plan.ServiceName {
	var having map[plan.ServiceName]bool
	if at, ok := parseAddress(text); ok {
		having = l.Having(at)
	}
	text = strings.ToLower(text)
	return slices.DeleteFunc(l.ServiceNames(), func(name plan.ServiceName) bool {
		return !having[name] && !strings.Contains(name.String(), text)
	})
}

// parseAddress reads an address as pages and people write it: ADDRESS[:PORT][/PROTO], or
// node:PORT[/PROTO].
func parseAddress(text string) (at plan.FrontendKey, ok bool) {
	text, at.Protocol = cutProtocol(text)
	if port, found := strings.CutPrefix(text, "node:"); found {
		number, err := strconv.ParseUint(port, 10, 16)
		at.Port = uint16(number)
		return at, err == nil && number > 0
	}
	if a, err := netip.ParseAddrPort(text); err == nil {
		at.Addr, at.Port = a.Addr().Unmap(), a.Port()
		return at, true
	}
	a, err := netip.ParseAddr(strings.Trim(text, "[]"))
	at.Addr = a.Unmap()
	return at, err == nil
}

// row keeps little of an answer, because a Service may have very many endpoints.
func (s *Subject) row(name plan.ServiceName) serviceRow {
	a := Explain(s.Loop, s.Environment, Question{Text: name.String(), Service: name})
	row := serviceRow{Name: name.String(), Verdict: a.Verdict, Problems: a.Problems[:min(len(a.Problems), maxListed)]}
	add := func(list *[]string, text string) {
		if !slices.Contains(*list, text) {
			*list = append(*list, text)
		}
	}
	if a.Sentence != "" {
		add(&row.Reasons, a.Sentence)
	}
	for _, doubt := range a.Doubts {
		add(&row.Reasons, doubt+".")
	}
	for _, p := range a.Ports {
		for _, c := range p.Connections {
			add(&row.Frontends, c.Address)
			if c.Verdict != Served {
				add(&row.Reasons, c.Sentence)
			}
		}
		// The sets of one port have the same endpoints: the first is that of policy Cluster,
		// if any connection has it.
		if len(p.Sets) > 0 {
			row.All += len(p.Sets[0].Endpoints)
			for _, e := range p.Sets[0].Endpoints {
				if e.Used {
					row.Endpoints++
				}
			}
		}
	}
	row.Frontends, row.Reasons = shortened(row.Frontends), shortened(row.Reasons)
	return row
}

// shortened returns at most maxListed texts, and how many more there are.
func shortened(texts []string) []string {
	if more := len(texts) - maxListed; more > 0 {
		return append(texts[:maxListed], fmt.Sprintf("and %d more", more))
	}
	return texts
}

// servicePage explains one Service.
func servicePage(r *http.Request, s Subject, c *pageContent, ask func(func()) error) error {
	name := plan.ServiceName{Namespace: r.PathValue("namespace"), Name: r.PathValue("name")}
	c.Question = name.String()
	return ask(func() {
		c.Answer = Explain(s.Loop, s.Environment, Question{Text: name.String(), Service: name})
		if !slices.Contains(s.Loop.ServiceNames(), name) {
			c.Code = http.StatusNotFound
		}
		c.Cut = c.Answer.cut()
	})
}

// cut limits each list, and says whether one was longer.
func (a *Answer) cut() (was bool) {
	a.Problems = first(a.Problems, maxRows, &was)
	a.Ports = first(a.Ports, maxPorts, &was)
	for i := range a.Ports {
		p := &a.Ports[i]
		p.Connections = first(p.Connections, maxRows, &was)
		for j := range p.Connections {
			p.Connections[j].SourceRanges = first(p.Connections[j].SourceRanges, maxRows, &was)
		}
		p.SlicesLeftOut = first(p.SlicesLeftOut, maxRows, &was)
		for j := range p.Sets {
			p.Sets[j].Endpoints = first(p.Sets[j].Endpoints, maxRows, &was)
		}
	}
	return was
}

// first returns at most a number of entries, and sets cut if there are more.
func first[T any](list []T, most int, cut *bool) []T {
	*cut = *cut || len(list) > most
	return list[:min(len(list), most)]
}
