package daemon

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/internal/wait"
)

// nodeLockName is an abstract Unix socket. Each network namespace has one, as it has
// one set of kernel tables. The socket goes with its process, and needs no file that
// two containers share.
const nodeLockName = "@signalbox-serves-this-node"

// nodeLock is held by the one signalbox that serves a network namespace. Two processes
// that write the same tables would undo each other's changes.
//
// A process that starts later acquires the lock once it serves: in a rolling update
// with surge the old process still runs then. The old process pauses, and serves again
// if the other ends first.
type nodeLock struct {
	name string
	log  *slog.Logger
	// handoverTimeout bounds the wait for a holder that does not answer.
	handoverTimeout time.Duration
	// requestTimeout bounds the wait for the first word of a client. Other clients wait
	// meanwhile.
	requestTimeout time.Duration
	// conditions are sent to a client that asks for them.
	conditions func() []string

	mu       sync.Mutex // guards what follows
	listener *net.UnixListener
	// predecessors are connections to the processes that handed the lock over to this
	// one. They stay open, because closing one would say that this process has ended.
	predecessors []*net.UnixConn
	// successor is the process that the lock was handed over to.
	successor *contender
}

func newNodeLock(log *slog.Logger, conditions func() []string) *nodeLock {
	return &nodeLock{name: nodeLockName, log: log, handoverTimeout: 30 * time.Second, requestTimeout: time.Second, conditions: conditions}
}

const (
	wordAcquire    = "take\n"       // from the contender: it serves, hand over
	wordReleased   = "given\n"      // from the holder: it writes no more
	wordConditions = "conditions\n" // from `signalbox ready`; the answer has a line for each
)

var (
	errOtherUser = errors.New("it belongs to another user")
	errAnswered  = errors.New("it only asked for the conditions")
)

// acquire acquires the lock, from its holder if there is one. If the holder does not
// answer in time, the error says so, and the next call tries again.
func (n *nodeLock) acquire(ctx context.Context) error {
	if n.held() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, n.handoverTimeout)
	defer cancel()
	for {
		err := n.listen()
		if err == nil || !errors.Is(err, unix.EADDRINUSE) {
			return err
		}
		err = n.requestHandover(ctx)
		if holderIsGone(err) && wait.For(ctx, acquireRetry) {
			continue
		}
		if err != nil {
			return fmt.Errorf("the signalbox that serves this node does not hand it over: %w", err)
		}
	}
}

func (n *nodeLock) held() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.listener != nil
}

// tookOver says whether another process has handed the lock over to this one.
func (n *nodeLock) tookOver() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.predecessors) > 0
}

// acquireRetry is short, because the lock may just change hands. It is not 0, because
// a holder that trusts nobody looks the same.
const acquireRetry = 10 * time.Millisecond

// holderIsGone says whether the holder ended, or handed the lock over to another
// process, before it read the request.
func holderIsGone(err error) bool {
	return errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)
}

// requestHandover asks the holder for the lock. The connection stays open as long as
// this process lives: its end tells the other process.
func (n *nodeLock) requestHandover(ctx context.Context) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", n.name)
	if err != nil {
		return err
	}
	c := conn.(*net.UnixConn)
	deadline, _ := ctx.Deadline()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	c.SetDeadline(deadline)
	if err = trusted(c); err == nil {
		err = send(c, wordAcquire)
	}
	if err == nil {
		err = receive(c, wordReleased)
	}
	if err != nil {
		c.Close()
		return err
	}
	n.log.Info("the signalbox that served this node before has stopped writing")
	n.mu.Lock()
	defer n.mu.Unlock()
	n.predecessors = append(n.predecessors, c)
	return nil
}

// waitForPredecessors waits until the processes have ended that held the lock before;
// false if ctx ends first. They may have connections open.
func (n *nodeLock) waitForPredecessors(ctx context.Context) bool {
	n.mu.Lock()
	before := slices.Clone(n.predecessors)
	n.mu.Unlock()
	for _, c := range before {
		waitForEnd(ctx, c)
	}
	return ctx.Err() == nil
}

// waitForEnd returns when the other side of a connection has ended, or ctx.
func waitForEnd(ctx context.Context, c *net.UnixConn) {
	stop := context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	c.SetReadDeadline(time.Time{})
	for {
		if _, err := c.Read(make([]byte, 1)); err != nil {
			return
		}
	}
}

func (n *nodeLock) listen() error {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: n.name, Net: "unix"})
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.listener = l
	return nil
}

// contender is a process that serves and requests the lock.
type contender struct{ conn *net.UnixConn }

// nextContender returns the next process that requests the lock; nil when ctx ends.
func (n *nodeLock) nextContender(ctx context.Context) *contender {
	n.mu.Lock()
	l := n.listener
	n.mu.Unlock()
	if l == nil {
		<-ctx.Done()
		return nil
	}
	l.SetDeadline(time.Time{})
	stop := context.AfterFunc(ctx, func() { l.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			if ctx.Err() == nil {
				n.log.Error("cannot learn of a signalbox that takes over", "error", err)
				<-ctx.Done()
			}
			return nil
		}
		if err := n.readRequest(ctx, c); err != nil {
			level := slog.LevelWarn
			if errors.Is(err, io.EOF) || errors.Is(err, errAnswered) {
				level = slog.LevelDebug // signalbox ready
			}
			n.log.Log(ctx, level, "a request for the node lock is not granted; this signalbox goes on serving", "error", err)
			c.Close()
			continue
		}
		return &contender{c}
	}
}

// readRequest returns nil if the client requests the lock. It waits for the request no
// longer than requestTimeout, nor than ctx.
func (n *nodeLock) readRequest(ctx context.Context, c *net.UnixConn) error {
	if err := trusted(c); err != nil {
		return err
	}
	c.SetDeadline(time.Now().Add(n.requestTimeout))
	cut := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		c.SetReadDeadline(time.Unix(1, 0))
		close(cut)
	})
	word, err := readWord(c)
	if !stop() {
		<-cut // or it could still cut off what is read later
	}
	switch {
	case err != nil:
		return err
	case word == wordConditions:
		return cmp.Or(n.sendConditions(c), errAnswered)
	}
	return expect(word, wordAcquire)
}

// sendConditions writes the conditions, one line each.
func (n *nodeLock) sendConditions(c *net.UnixConn) error {
	for _, text := range n.conditions() {
		if err := send(c, strings.ReplaceAll(text, "\n", " ")+"\n"); err != nil {
			return err
		}
	}
	return nil
}

// handOver releases the lock and tells the contender. This process must not write any
// more.
func (n *nodeLock) handOver(to *contender) error {
	n.release()
	n.mu.Lock()
	n.successor = to
	n.mu.Unlock()
	to.conn.SetDeadline(time.Now().Add(n.handoverTimeout))
	return send(to.conn, wordReleased)
}

// release releases the lock without a contender.
func (n *nodeLock) release() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.listener != nil {
		n.listener.Close()
		n.listener = nil
	}
}

// waitWhileHandedOver waits until the successor has ended; false if ctx ends first.
func (n *nodeLock) waitWhileHandedOver(ctx context.Context) bool {
	n.mu.Lock()
	to := n.successor
	n.mu.Unlock()
	if to == nil {
		return true
	}
	waitForEnd(ctx, to.conn)
	if ctx.Err() != nil {
		return false // and the connection stays: this process may have others open
	}
	to.conn.Close()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.successor = nil
	return true
}

func send(c *net.UnixConn, word string) error {
	_, err := c.Write([]byte(word))
	return err
}

func readWord(c *net.UnixConn) (string, error) { return bufio.NewReaderSize(c, 16).ReadString('\n') }

func receive(c *net.UnixConn, want string) error {
	word, err := readWord(c)
	if err != nil {
		return err
	}
	return expect(word, want)
}

func expect(word, want string) error {
	if word != want {
		return fmt.Errorf("it said %q, not %q", word, want)
	}
	return nil
}

// trusted says whether the other side is of root or of this process's own user. In the
// host's network namespace anybody can connect to the socket.
func trusted(c *net.UnixConn) error {
	cred, err := peer(c)
	if err != nil {
		return err
	}
	return trustedUser(cred)
}

func trustedUser(cred *syscall.Ucred) error {
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("%w: %d", errOtherUser, cred.Uid)
	}
	return nil
}

// peer returns the credentials of the other side.
func peer(c *net.UnixConn) (cred *syscall.Ucred, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	controlErr := raw.Control(func(fd uintptr) {
		cred, err = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	})
	return cred, errors.Join(controlErr, err)
}
