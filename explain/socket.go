// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"signalbox/internal/httpserve"
	"signalbox/internal/namespace"
	"signalbox/internal/rootonly"
	"signalbox/internal/wait"
)

// Socket is the local socket on which a daemon answers root's questions. It is not
// open yet when zero. One goroutine uses it.
type Socket struct {
	dir  string
	stop func() // nil while it is closed
}

// Open serves answers on a socket in a directory that only this process's user may
// enter; none if dir is empty. It returns after the first attempt to listen. Without the
// socket, everything else works.
func (s *Socket) Open(dir string, answers http.Handler, log *slog.Logger) {
	if s.stop != nil && s.dir == dir {
		return
	}
	s.Close()
	if s.dir = dir; dir == "" {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	tried, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		serve(ctx, dir, answers, log, sync.OnceFunc(func() { close(tried) }))
	}()
	s.stop = func() { cancel(); <-ended }
	<-tried
}

// serve serves answers until ctx ends. It tries again while it cannot listen, or accept
// connections, and after its socket was lost. It calls tried after each attempt to listen.
func serve(ctx context.Context, dir string, answers http.Handler, log *slog.Logger, tried func()) {
	logged := false
	for again := true; again; again = wait.For(ctx, httpserve.RetryAfter) {
		l, err := listen(dir)
		tried()
		if err == nil {
			logged = false
			if err = serveUntilLost(ctx, l, answers, log); err == nil {
				return
			}
		}
		if !logged {
			log.Info("there is no local socket; signalbox explain, status, diff and trace cannot ask this process, and Services are served without it; trying again",
				"directory", dir, "every", httpserve.RetryAfter, "error", err)
			logged = true
		}
	}
}

var errLost = errors.New("the socket has been removed, or replaced by a process that has ended")

// serveUntilLost returns nil when ctx ends. In an update that is given up, the new process
// replaces the socket, and ends.
func serveUntilLost(ctx context.Context, l *rootonly.Listener, answers http.Handler, log *slog.Logger) error {
	serving, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		for wait.For(serving, httpserve.RetryAfter) {
			if l.Lost() {
				cancel(errLost)
			}
		}
	}()
	if err := httpserve.Serve(serving, l, answers, log); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return nil
	}
	return context.Cause(serving)
}

// Close returns when the socket is closed.
func (s *Socket) Close() {
	if s.stop != nil {
		s.stop()
		s.stop = nil
	}
}

// socketPath is that of the calling thread's network namespace, which one signalbox
// serves.
func socketPath(dir string) (string, error) {
	id, err := namespace.Current()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, fmt.Sprintf("net-%d.sock", id.Inode)), nil
}

// listen takes the place of a process that serves the namespace now, or did.
func listen(dir string) (*rootonly.Listener, error) {
	if err := rootonly.MakeDir(dir); err != nil {
		return nil, err
	}
	path, err := socketPath(dir)
	if err != nil {
		return nil, err
	}
	return rootonly.Listen(path)
}

// ErrNoDaemon says that no daemon has a socket for this network namespace.
var ErrNoDaemon = errors.New("no signalbox of this network namespace answers")

// askWithin bounds the wait for an answer, by path. A frozen daemon (SIGSTOP) accepts
// connections and never answers. /explain and /diff read the kernel; the server ends each
// answer after two minutes.
var askWithin = map[string]time.Duration{
	"/explain": 2 * time.Minute, "/diff": 2 * time.Minute,
	"/status": 2 * askTimeout, "/frontends": 2 * askTimeout,
}

// Ask asks the daemon that serves this network namespace, and decodes its answer.
func Ask(ctx context.Context, dir, path string, query url.Values, answer any) error {
	if dir == "" {
		return fmt.Errorf("%w: --run-dir is empty", ErrNoDaemon)
	}
	ctx, cancel := context.WithTimeout(ctx, askWithin[path])
	defer cancel()
	err := ask(ctx, dir, path, query, answer)
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("the running signalbox does not answer within %v", askWithin[path])
	}
	return err
}

func ask(ctx context.Context, dir, path string, query url.Values, answer any) error {
	socket, err := socketPath(dir)
	if err != nil {
		return err
	}
	var d net.Dialer
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", socket) }}
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://signalbox"+path+"?"+query.Encode(), nil)
	if err != nil {
		return err
	}
	response, err := (&http.Client{Transport: transport}).Do(request)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("%w at %s", ErrNoDaemon, socket)
	}
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("asking the running signalbox needs root: %w", err)
	}
	if err != nil {
		return fmt.Errorf("asking the running signalbox: %w", err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(response.Body, 4<<10))
		return fmt.Errorf("the running signalbox does not answer: %s", strings.TrimSpace(string(text)))
	}
	if err := json.NewDecoder(response.Body).Decode(answer); err != nil {
		return fmt.Errorf("reading the answer of the running signalbox: %w", err)
	}
	return nil
}
